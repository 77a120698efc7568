"""AdamW, Muon, NorMuon, U-NorMuon and Aurora behind one vocabulary. Needs torch and nothing else.

Shape legend of this package: K stacked matrices, M rows (fan-out), N columns (fan-in).
"""

from aurora.adamw import adamw
from aurora.aurora import VARIANTS, Aurora
from aurora.base import MatrixOptimizer
from aurora.muon import Muon
from aurora.normuon import NorMuon
from aurora.params import Param, Role, check_exact_cover
from aurora.polar import SCHEDULES, PolarSchedule, compute_dtype, polar
from aurora.registry import REQUIRED_HPARAMS, RULES, build, hparam_types
from aurora.riemannian_aurora import RiemannianAurora
from aurora.unormuon import UNorMuon

__all__ = [
    "REQUIRED_HPARAMS",
    "RULES",
    "SCHEDULES",
    "VARIANTS",
    "Aurora",
    "MatrixOptimizer",
    "Muon",
    "NorMuon",
    "Param",
    "PolarSchedule",
    "RiemannianAurora",
    "Role",
    "UNorMuon",
    "adamw",
    "build",
    "check_exact_cover",
    "compute_dtype",
    "hparam_types",
    "polar",
]
