"""AdamW, Muon, NorMuon, U-NorMuon and Aurora behind one vocabulary. Needs torch and nothing else.

A name's module is imported when the name is asked for, so that importing this package is cheap and imports no torch.
The function polar() is in the module polar: here that name means the module.

Shape legend of this package: K stacked matrices, M rows (fan-out), N columns (fan-in).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adamw import AdamW as AdamW
    from .aurora import VARIANTS as VARIANTS
    from .aurora import Aurora as Aurora
    from .base import MatrixOptimizer as MatrixOptimizer
    from .muon import Muon as Muon
    from .normuon import NorMuon as NorMuon
    from .params import Param as Param
    from .params import Role as Role
    from .params import check_exact_cover as check_exact_cover
    from .polar import SCHEDULES as SCHEDULES
    from .polar import PolarSchedule as PolarSchedule
    from .polar import compute_dtype as compute_dtype
    from .registry import REQUIRED_HPARAMS as REQUIRED_HPARAMS
    from .registry import build as build
    from .registry import find_rule as find_rule
    from .registry import hparam_types as hparam_types
    from .riemannian_aurora import RiemannianAurora as RiemannianAurora
    from .unormuon import UNorMuon as UNorMuon

_MODULE_OF = {
    "AdamW": "adamw",
    "Aurora": "aurora",
    "MatrixOptimizer": "base",
    "Muon": "muon",
    "NorMuon": "normuon",
    "Param": "params",
    "PolarSchedule": "polar",
    "REQUIRED_HPARAMS": "registry",
    "RiemannianAurora": "riemannian_aurora",
    "Role": "params",
    "SCHEDULES": "polar",
    "UNorMuon": "unormuon",
    "VARIANTS": "aurora",
    "build": "registry",
    "check_exact_cover": "params",
    "compute_dtype": "polar",
    "find_rule": "registry",
    "hparam_types": "registry",
}
__all__ = [*_MODULE_OF]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
