"""Whether a model is the one that the fast forward passes of this package were made for.

They compute what the model section of train_gpt.py says, and would go on doing so if somebody edited that section. So
they are used only where every definition that the model is made of has the syntax tree of MIRRORED (comments,
docstrings and formatting do not count), the classes in memory are those of the file, every submodule is of the class
that belongs in its place, and nothing is patched or hooked. Every other model runs as it is written.

To change the model for everybody: change forward.py and hopper.py with it, then put what `python -m aurora.fast.mirror`
prints in the place of MIRRORED.
"""

from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

from torch import nn

from .definitions import ROOT_CLASS, definitions_of, hashes
from .float8 import Float8Linear

MIRRORED = {
    "other statements": "80dc365030ae2e89",
    "GPT": "eb762eb64829f4b9",
    "Block": "dfd439a97a5304d8",
    "Attention": "65856d6c850fcffa",
    "F": "5af419e14b127f8e",
    "Linear": "dc50ae608e1b62ed",
    "Tensor": "ec817b63d0ea9625",
    "nn": "6dde0dc74dfbde17",
    "ModelConfig": "e26a83988cd38cb1",
    "Rotary": "042ec21878ff8a93",
    "torch": "cf1070d3a16f24b2",
    "MLP": "9cfba49d3394dfe0",
    "RMSNorm": "27cfddf5bbf68956",
    "Float8Linear": "bff407870503b5eb",
    "aurora": "c0001762112255a8",
    "math": "b67c9ddef3e0c371",
}
# The class of each submodule, by the last part of its name.
PLACES = {
    **dict.fromkeys(("embed_norm", "attention_norm", "mlp_norm", "head_norm"), "RMSNorm"),
    **dict.fromkeys(("q", "k", "v", "out", "gate", "up", "down", "head"), "Linear"),
    **{"": ROOT_CLASS, "attention": "Attention", "rotary": "Rotary", "mlp": "MLP"},
}
LIBRARY = {"embed": nn.Embedding, "blocks": nn.ModuleList, "head": Float8Linear}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def edits(model: nn.Module) -> list[str]:
    """In what the model is another one, in words; empty where it is the mirrored one."""
    try:
        namespace = namespace_of(model)
        source = Path(namespace["__file__"]).read_text(encoding="utf-8")
        definitions = definitions_of(source)
    except (OSError, KeyError, AttributeError, SyntaxError, UnicodeDecodeError) as error:
        return [f"{type(model).__name__} has no source file ({type(error).__name__})"]
    found = hashes(definitions)
    names = [name for name in dict.fromkeys([*MIRRORED, *found]) if found.get(name) != MIRRORED.get(name)]
    return (
        [f"{name} is edited" for name in names]
        or [f"{name} is not what its file says" for name in patched(namespace, source)]
        or list(strange_parts(model))
    )


def namespace_of(model: nn.Module) -> dict[str, Any]:
    """The names at the top of the file that defines the model's class."""
    return type(model).__init__.__globals__


# ---- what is in memory ----


def patched(namespace: dict[str, Any], source: str) -> list[str]:
    """The names that stand for something else in memory than where the file, which is unedited, is run anew."""
    fresh = {"__name__": __name__, "__file__": namespace["__file__"]}
    exec(compile(source, namespace["__file__"], "exec", dont_inherit=True), fresh)
    names = [name for name in MIRRORED if name in fresh]
    return [name for name in names if content(namespace.get(name)) != content(fresh[name])]


def content(value: object) -> object:
    """What tells a class or function of the model's file from others; anything else is told by its identity."""
    if isinstance(value, type) and issubclass(value, nn.Module):
        methods = {name: function for name, function in vars(value).items() if callable(function)}
        return {name: content(function) for name, function in methods.items() if not name.startswith("__annotate")}
    if not isinstance(value, FunctionType):
        return value
    wrapped = content(value.__wrapped__) if hasattr(value, "__wrapped__") else None
    return value.__code__, value.__defaults__, value.__kwdefaults__, wrapped


def strange_parts(model: nn.Module) -> Iterator[str]:
    """Submodules of a model of mirrored classes that are of another class, patched or hooked, in words."""
    namespace = namespace_of(model)
    if any(getattr(nn.modules.module, f"_global{hooks}") for hooks in HOOKS):
        yield "a hook is on all modules"
    for name, part in model.named_modules():
        place, last, cls = name or "the model", name.split(".")[-1], type(part)
        wanted = namespace.get("Block" if last.isdecimal() else PLACES.get(last, ""))
        if cls not in (wanted, LIBRARY.get(last)):
            yield f"{place} is a {cls.__module__}.{cls.__qualname__}"
        elif shadowed := [key for key in vars(part) if callable(getattr(cls, key, None))]:
            yield f"{place}.{shadowed[0]} is patched"
        elif any(getattr(part, hooks) for hooks in HOOKS):
            yield f"{place} has a hook"
        elif any(type(p) is not nn.Parameter for p in part.parameters(recurse=False)):
            yield f"{place} has parameters that are no plain torch.nn.Parameter"


if __name__ == "__main__":
    import train_gpt

    for name, digest in hashes(definitions_of(Path(train_gpt.__file__).read_text(encoding="utf-8"))).items():
        print(f'    "{name}": "{digest}",')
