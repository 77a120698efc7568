"""Where an optimizer of others comes from: its class, the source of that, and the version of its package."""

import functools
import importlib.metadata
import inspect
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import aurora
from aurora.config import ROOT
from aurora.trainer.identity import EXTERNAL


def describe_rule(path: str, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a record says of module:Class: the class of its optimizer, and for the top level of each one's module the
    package that has installed it, with its version; an empty text for a file of one's own.
    """
    cls = type(optimizer)
    names = sorted({module.__name__.partition(".")[0] for module in modules_of(path, optimizer)})
    packages = {name: package_of(name) for name in names}
    return {"class": f"{cls.__module__}.{cls.__qualname__}", "packages": packages}


@functools.lru_cache(maxsize=16)
def package_of(name: str) -> str:
    """The distribution that has installed a module of the top level, and its version; empty for a file of one's own."""
    try:
        found = importlib.metadata.distribution(name)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        file = getattr(sys.modules.get(name), "__file__", None) or ""
        # Of the others: this reads the lists of all files of all packages.
        names = importlib.metadata.packages_distributions().get(name) if "site-packages" in file else None
        if not names:
            return ""
        found = importlib.metadata.distribution(names[0])
    return f"{found.metadata['Name']} {found.version}"


def modules_of(path: str, optimizer: torch.optim.Optimizer) -> list[ModuleType]:
    """The modules that define what module:Class names, and the class of its optimizer."""
    rule = aurora.find_rule(path)
    names = [getattr(getattr(rule, "func", rule), "__module__", None), type(optimizer).__module__]
    return [sys.modules[name] for name in dict.fromkeys([*names, path.partition(":")[0]]) if name in sys.modules]


def external_sources(path: str, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """The texts of the modules of modules_of(), but torch's; of files of one's own also those beside them that this
    process has imported. Names are those of the modules, below EXTERNAL/.
    """
    found: dict[str, str] = {}
    for module in modules_of(path, optimizer):
        if module.__name__.partition(".")[0] == "torch":
            continue
        found |= dict(source_of(module))
        if not package_of(module.__name__.partition(".")[0]) and (folder := folder_of(module)):
            for other in list(sys.modules.values()):
                if is_below(other, folder):
                    found |= dict(source_of(other))
    return found


def source_of(module: ModuleType) -> Iterator[tuple[str, str]]:
    """Name and text of a module of Python outside the checkout, whose own sources a record has anyway."""
    file = getattr(module, "__file__", None) or ""
    is_of_checkout = is_below(module, ROOT) or module.__name__ == "__main__"
    if file.endswith(".py") and not is_of_checkout:
        name = module.__name__.replace(".", "/") + ("/__init__.py" if is_package(module) else ".py")
        yield f"{EXTERNAL}/{name}", Path(file).read_text(encoding="utf-8")


def is_package(module: ModuleType) -> bool:
    return hasattr(module, "__path__")


def folder_of(module: ModuleType) -> Path | None:
    """The folder on the path where a module's top level is."""
    file = inspect.getsourcefile(module) if getattr(module, "__file__", None) else None
    if file is None:
        return None
    depth = module.__name__.count(".") + is_package(module)
    return Path(os.path.realpath(file)).parents[depth]


def is_below(module: ModuleType, folder: Path) -> bool:
    """Whether a module is of a folder, and of no environment in it."""
    file = getattr(module, "__file__", None) or ""
    installed = (sys.prefix, sys.base_prefix, "site-packages")
    is_inside = os.path.isabs(file) and Path(os.path.realpath(file)).is_relative_to(folder)
    return is_inside and not any(place in file for place in installed)
