"""AdamW, Muon, NorMuon, U-NorMuon and Aurora behind one vocabulary. Needs torch and nothing else.

Shape legend of this package: K stacked matrices, M rows (fan-out), N columns (fan-in).
"""

import time

IMPORT_BEGIN_NS = time.perf_counter_ns()  # of what a run imports, which takes seconds and is recorded

from aurora.optim.adamw import adamw
from aurora.optim.aurora import VARIANTS, Aurora
from aurora.optim.base import MatrixOptimizer
from aurora.optim.muon import Muon
from aurora.optim.normuon import NorMuon
from aurora.optim.params import Param, Role, check_exact_cover
from aurora.optim.polar import SCHEDULES, PolarSchedule, compute_dtype, polar
from aurora.optim.registry import REQUIRED_HPARAMS, RULES, build, hparam_types
from aurora.optim.riemannian_aurora import RiemannianAurora
from aurora.optim.unormuon import UNorMuon

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
