"""U-NorMuon (Tilde Research 2026, https://blog.tilderesearch.com/blog/aurora)."""

from collections.abc import Iterable
from typing import Any

from .normuon import NorMuon


class UNorMuon(NorMuon):
    """NorMuon whose tall updates keep the row norm sqrt(N/M) of an orthogonal matrix with uniform rows.

    NorMuon scales a tall update by sqrt(M/N), which gives its rows norm 1. Without that scale the rows of a tall
    update have norm sqrt(N/M); wide and square updates are NorMuon's. So this is NorMuon with aspect_scale off, and
    its lr is sqrt(M/N) times smaller in effect on tall matrices. direction has NorMuon's bounds.
    """

    def __init__(self, params: Iterable[Any], lr: float, aspect_scale: bool = False, **normuon_hparams: Any):
        super().__init__(params, lr, aspect_scale=aspect_scale, **normuon_hparams)
