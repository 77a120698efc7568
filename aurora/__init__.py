"""The public names of aurora.optim, and polar(). Each is imported when it is asked for, and torch with the first."""

import importlib
import time
from typing import TYPE_CHECKING, Any

from aurora import optim

if TYPE_CHECKING:
    from aurora.optim import *  # noqa: F403
    from aurora.optim.polar import polar as polar

IMPORT_BEGIN_NS = time.perf_counter_ns()  # of what a run imports, which takes seconds and is recorded

__version__ = optim.__version__
__all__ = ["polar", *optim.__all__]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("aurora.optim.polar") if name == "polar" else optim, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
