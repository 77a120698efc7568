"""Whether a model is the one that the fast forward passes of this package were made for.

They compute what the model section of train_gpt.py says, and would go on doing so if somebody edited that section. So
they are used only where every definition that the model is made of has the syntax tree of MIRRORED (comments,
docstrings and formatting do not count), the classes in memory are those of the file, all submodules are of exactly
these classes, and nothing is patched or hooked. Every other model runs as it is written.

To change the model for everybody: change forward.py and hopper.py with it, then put what `python -m aurora.fast.mirror`
prints in the place of MIRRORED.
"""

import ast
import hashlib
import importlib
import inspect
import sys
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType

from torch import nn

from .float8 import Float8Linear

ROOT_CLASS = "GPT"
MIRRORED = {
    "GPT": "af8ef0b6ee45769f",
    "Block": "dfd439a97a5304d8",
    "Attention": "65856d6c850fcffa",
    "F": "5af419e14b127f8e",
    "Linear": "dc50ae608e1b62ed",
    "Tensor": "ec817b63d0ea9625",
    "nn": "6dde0dc74dfbde17",
    "ModelConfig": "e26a83988cd38cb1",
    "Rotary": "81e8b71ec175e855",
    "torch": "cf1070d3a16f24b2",
    "MLP": "9cfba49d3394dfe0",
    "RMSNorm": "27cfddf5bbf68956",
    "Float8Linear": "bff407870503b5eb",
    "aurora": "c0001762112255a8",
    "math": "b67c9ddef3e0c371",
}
# Classes from elsewhere that the model is made of.
LIBRARY = (nn.Embedding, nn.ModuleList, Float8Linear)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def edits(model: nn.Module) -> list[str]:
    """In what the model is another one, in words; empty where it is the mirrored one."""
    module = sys.modules[type(model).__module__]
    try:
        definitions = definitions_of(inspect.getsource(module))
    except (OSError, SyntaxError) as error:
        return [f"{type(model).__name__} has no source: {error}"]
    found = [f"{name} is edited" for name in edited(definitions)]
    found += [f"{name} is not what its file says" for name in patched(module, definitions)]
    return found or list(strange_parts(model))


def hashes(definitions: dict[str, ast.stmt]) -> dict[str, str]:
    """Of each definition, by name, without docstrings and type parameters that only later versions of Python have."""
    return {name: hashlib.sha256(ast.unparse(node).encode()).hexdigest()[:16] for name, node in definitions.items()}


def edited(definitions: dict[str, ast.stmt]) -> list[str]:
    """The names whose definition is not the mirrored one, or is there on one side only."""
    found = hashes(definitions)
    return [name for name in dict.fromkeys([*MIRRORED, *found]) if found.get(name) != MIRRORED.get(name)]


def definitions_of(source: str) -> dict[str, ast.stmt]:
    """What the model is made of: the definitions and imports that its class names, and those that these name."""
    by_name: dict[str, ast.stmt] = {}
    for node in ast.parse(source).body:
        for name, statement in named(node):
            by_name[name] = statement
    found: dict[str, ast.stmt] = {}
    todo = [ROOT_CLASS]
    while todo:
        name = todo.pop()
        if name in by_name and name not in found:
            found[name] = without_docstrings(by_name[name])
            todo += sorted({node.id for node in ast.walk(found[name]) if isinstance(node, ast.Name)}, reverse=True)
    return found


def named(node: ast.stmt) -> Iterator[tuple[str, ast.stmt]]:
    """The names that a statement at the top of a file binds, each with what binds it."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        for alias in node.names:
            alone = (
                ast.Import([alias])
                if isinstance(node, ast.Import)
                else ast.ImportFrom(node.module, [alias], node.level)
            )
            yield (alias.asname or alias.name).split(".")[0], alone
    elif isinstance(node, ast.ClassDef | ast.FunctionDef):
        yield node.name, node
    else:
        for part in ast.walk(node):
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                yield part.id, node


def without_docstrings(node: ast.stmt) -> ast.stmt:
    for part in ast.walk(node):
        if isinstance(part, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(part, clean=False) is not None:
            part.body = part.body[1:] or [ast.Pass()]
    return node


# ---- what is in memory ----


def patched(module: ModuleType, definitions: dict[str, ast.stmt]) -> list[str]:
    """Classes and functions in memory that are not those of the file."""
    code = compile(inspect.getsource(module), str(module.__file__), "exec")
    in_file = {constant.co_name: constant for constant in code.co_consts if isinstance(constant, CodeType)}
    found = []
    for name, node in definitions.items():
        value = getattr(module, name, None)
        if isinstance(node, ast.ClassDef):
            if not (isinstance(value, type) and methods_of(value) == functions_in(in_file[name])):
                found.append(name)
        elif (
            isinstance(node, ast.FunctionDef)
            and not is_code_of(value, in_file[name])
            or isinstance(node, ast.Import | ast.ImportFrom)
            and value is not imported(node)
        ):
            found.append(name)
    return found


def imported(node: ast.Import | ast.ImportFrom) -> object:
    """What an import of one name binds."""
    (alias,) = node.names
    if isinstance(node, ast.ImportFrom):
        return getattr(importlib.import_module(node.module or ""), alias.name, None)
    return sys.modules.get(alias.name if alias.asname else alias.name.split(".")[0])


def methods_of(cls: type) -> dict[str, tuple]:
    methods = {name: getattr(value, "__func__", value) for name, value in vars(cls).items()}
    return {name: content(inspect.unwrap(f).__code__) for name, f in methods.items() if isinstance(f, FunctionType)}


def functions_in(code: CodeType) -> dict[str, tuple]:
    return {constant.co_name: content(constant) for constant in code.co_consts if isinstance(constant, CodeType)}


def is_code_of(value: object, code: CodeType) -> bool:
    return isinstance(value, FunctionType) and content(inspect.unwrap(value).__code__) == content(code)


def content(code: CodeType) -> tuple:
    """What a function does, whatever its place in the file."""
    constants = tuple(content(c) if isinstance(c, CodeType) else (type(c), c) for c in code.co_consts)
    return code.co_code, constants, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars


def strange_parts(model: nn.Module) -> Iterator[str]:
    """Submodules of a model of mirrored classes that are of another class, patched or hooked, in words."""
    module = sys.modules[type(model).__module__]
    known = {*LIBRARY, *(value for name in MIRRORED if isinstance(value := getattr(module, name, None), type))}
    in_all = nn.modules.module
    if any(getattr(in_all, f"_global{name}") for name in HOOKS):
        yield "a hook is on all modules"
    for name, part in model.named_modules():
        place, cls = name or "the model", type(part)
        if cls not in known:
            yield f"{place} is a {cls.__module__}.{cls.__qualname__}"
        elif shadowed := [key for key in vars(part) if callable(getattr(cls, key, None))]:
            yield f"{place}.{shadowed[0]} is patched"
        elif any(getattr(part, hooks) for hooks in HOOKS):
            yield f"{place} has a hook"
        elif any(type(p) is not nn.Parameter for p in part.parameters(recurse=False)):
            yield f"{place} has parameters that are no plain torch.nn.Parameter"


if __name__ == "__main__":
    import train_gpt

    for name, digest in hashes(definitions_of(inspect.getsource(train_gpt))).items():
        print(f'    "{name}": "{digest}",')
