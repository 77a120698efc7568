"""The trainer around train_gpt.py: ranks, clock, record, checkpoints, faults. Names are imported when they are used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import save_run
    from .clock import Clock
    from .journal import Journal
    from .launch import main_as_rank
    from .ranks import Ranks
    from .setup import check_run, open_run, resume
    from .state import Run
    from .warmup import Model, prepare

__all__ = [
    "Clock", "Journal", "Model", "Ranks", "Run", "check_run", "main_as_rank", "open_run", "prepare", "resume",
    "save_run",
]  # fmt: skip
_MODULE_OF = {"Clock": "clock", "Journal": "journal", "Model": "warmup", "Ranks": "ranks", "Run": "state"}
_MODULE_OF |= dict.fromkeys(("check_run", "open_run", "resume"), "setup")
_MODULE_OF |= {"main_as_rank": "launch", "prepare": "warmup", "save_run": "checkpoint"}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
