"""What a model is made of, by its file's syntax trees. Needs nothing but Python."""

import ast
import hashlib
from collections.abc import Iterator

ROOT_CLASS = "GPT"
OTHER = "other statements"  # at the top of the file, which may change anything, as `MLP.forward = ...` does


def hashes(definitions: dict[str, list[ast.stmt]]) -> dict[str, str]:
    """Of each definition as Python writes it from its syntax tree, by name."""
    texts = {name: "\n".join(map(ast.unparse, nodes)) for name, nodes in definitions.items()}
    return {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in texts.items()}


def definitions_of(source: str) -> dict[str, list[ast.stmt]]:
    """What the model is made of, by name: what its class names, what that names, and what cannot be told to be neither.

    Of a name that is bound more than once, every statement that binds it.
    """
    by_name: dict[str, list[ast.stmt]] = {OTHER: []}
    for node in ast.parse(source).body:
        for name, statement in bindings(node):
            by_name.setdefault(name, []).append(statement)
    found: dict[str, list[ast.stmt]] = {}
    todo = [ROOT_CLASS, OTHER]
    while todo:
        name = todo.pop()
        if name in by_name and name not in found:
            found[name] = [without_docstrings(node) for node in by_name[name]]
            # What other statements name is theirs: only what the model names is the model's.
            parts = [part for node in found[name] for part in ast.walk(node)] if name != OTHER else []
            todo += sorted({part.id for part in parts if isinstance(part, ast.Name)}, reverse=True)
    return found


def bindings(node: ast.stmt) -> Iterator[tuple[str, ast.stmt]]:
    """The names that a statement at the top of a file binds, each with the part that binds it."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        for alias in node.names:
            alone: ast.stmt = ast.Import([alias])
            if isinstance(node, ast.ImportFrom):
                alone = ast.ImportFrom(node.module, [alias], node.level)
            yield OTHER if alias.name == "*" else (alias.asname or alias.name).split(".")[0], alone
    elif isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield node.name, node
    elif isinstance(node, ast.Assign) and all(isinstance(target, ast.Name) for target in node.targets):
        yield from ((target.id, node) for target in node.targets if isinstance(target, ast.Name))
    elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):  # a docstring
        yield OTHER, node


def without_docstrings(node: ast.stmt) -> ast.stmt:
    for part in ast.walk(node):
        if isinstance(part, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(part, clean=False) is not None:
            part.body = part.body[1:] or [ast.Pass()]
    return node
