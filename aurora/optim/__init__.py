"""AdamW, Muon, NorMuon, U-NorMuon and Aurora behind one vocabulary. Needs torch and nothing else.

This folder is aurora.optim in a checkout, and the package aurora_optim where the wheel is installed.

A name's module is imported when the name is asked for, so that importing this package is cheap and imports no torch.
The function polar() is in the module polar: here that name means the module.

Shape legend of this package: K stacked matrices, M rows (fan-out), N columns (fan-in).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adamw import AdamW
    from .aurora import VARIANTS, Aurora
    from .base import MatrixOptimizer
    from .grouping import ParamGroups, param_groups
    from .muon import Muon
    from .normuon import NorMuon
    from .params import Param, Role, check_exact_cover
    from .polar import SCHEDULES, PolarSchedule, compute_dtype
    from .registry import REQUIRED_HPARAMS, build, find_rule, hparam_defaults, hparam_types, is_ours
    from .riemannian_aurora import RiemannianAurora
    from .telemetry import NeuronTelemetry
    from .unormuon import UNorMuon
else:  # hidden from type checkers, to which a misspelt name would be Any

    def __getattr__(name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


__version__ = "0.2.0"
__all__ = [
    "AdamW", "Aurora", "MatrixOptimizer", "Muon", "NeuronTelemetry", "NorMuon", "Param", "ParamGroups",
    "PolarSchedule", "REQUIRED_HPARAMS", "RiemannianAurora", "Role", "SCHEDULES", "UNorMuon", "VARIANTS", "build",
    "check_exact_cover", "compute_dtype", "find_rule", "hparam_defaults", "hparam_types", "is_ours", "param_groups",
]  # fmt: skip
_NAMES = {
    "adamw": ["AdamW"],
    "aurora": ["Aurora", "VARIANTS"],
    "base": ["MatrixOptimizer"],
    "grouping": ["ParamGroups", "param_groups"],
    "muon": ["Muon"],
    "normuon": ["NorMuon"],
    "params": ["Param", "Role", "check_exact_cover"],
    "polar": ["PolarSchedule", "SCHEDULES", "compute_dtype"],
    "registry": ["REQUIRED_HPARAMS", "build", "find_rule", "hparam_defaults", "hparam_types", "is_ours"],
    "riemannian_aurora": ["RiemannianAurora"],
    "telemetry": ["NeuronTelemetry"],
    "unormuon": ["UNorMuon"],
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
