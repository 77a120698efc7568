"""The trainer around train_gpt.py: ranks, clock, record, checkpoints, faults. Names are imported when they are used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aurora.trainer.checkpoint import save_run as save_run
    from aurora.trainer.clock import Clock as Clock
    from aurora.trainer.journal import Journal as Journal
    from aurora.trainer.launch import main_as_rank as main_as_rank
    from aurora.trainer.ranks import Ranks as Ranks
    from aurora.trainer.setup import check_run as check_run
    from aurora.trainer.setup import open_run as open_run
    from aurora.trainer.setup import resume as resume
    from aurora.trainer.state import Run as Run
    from aurora.trainer.warmup import Model as Model
    from aurora.trainer.warmup import prepare as prepare

MODULES = {
    "Clock": "clock",
    "Journal": "journal",
    "Model": "warmup",
    "Ranks": "ranks",
    "Run": "state",
    "check_run": "setup",
    "main_as_rank": "launch",
    "open_run": "setup",
    "prepare": "warmup",
    "resume": "setup",
    "save_run": "checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{MODULES[name]}"), name)
