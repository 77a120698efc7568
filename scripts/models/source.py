"""The code of a record's model as one module that needs torch alone. Parses sources, executes nothing.

A record embeds train_gpt.py and all that it imports. Taken are the definitions that the class GPT is made of, with what
they name, in train_gpt.py and in the project's modules that they come from (aurora/config.py has ModelConfig). Left out
is what trains: roles(), which tells the optimizers what each parameter is, and blocks `if __name__ == "__main__"`.
"""

import ast
import functools
from collections.abc import Iterator, Mapping

from aurora.config import ROOT
from aurora.fast.definitions import ROOT_CLASS, without_docstrings

MAIN, CONFIG_CLASS = "train_gpt.py", "ModelConfig"
NOT_OF_INFERENCE = "roles"
PACKAGES = ("aurora", "configs", "data", "results", "scripts", "tests", "train_gpt")


class SourceError(ValueError):
    """Sources of which no module can be made; the message names file and name."""


def model_source(sources: Mapping[str, str]) -> str:
    """The module's text, with the classes GPT and ModelConfig. sources: a record's, by the names of their files.

    Raises:
        SourceError: there is no model in them, or it needs more of the project than definitions.
    """
    bundle = Bundle(sources)
    if ROOT_CLASS not in bundle.names_of(MAIN):
        raise SourceError(f"{MAIN} has no class {ROOT_CLASS}")
    bundle.take(MAIN, ROOT_CLASS)
    bundle.take(MAIN, CONFIG_CLASS)  # from wherever it imports it
    for statement in bundle.others(MAIN):  # which may change the model, as `MLP.forward = ...` does
        bundle.keep(MAIN, statement)
    return bundle.text()


def is_same_code(one: str, other: str) -> bool:
    """Whether two modules differ in comments, docstrings and formatting at most."""
    try:
        return normal(one) == normal(other)
    except RecursionError:
        return False


def normal(text: str) -> str:
    return "\n".join(ast.unparse(without_docstrings(node)) for node in ast.parse(text).body)


@functools.cache
def source_here() -> str:
    """model_source() of this checkout. Raises SourceError, OSError."""
    paths = [ROOT / MAIN, *(ROOT / "aurora").rglob("*.py")]
    return model_source({path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths})


class Bundle:
    """Statements of several files, gathered by name."""

    def __init__(self, sources: Mapping[str, str]):
        self.sources = sources
        self.tables: dict[str, dict[str, list[ast.stmt]]] = {}
        self.imports: dict[str, None] = {}  # of other packages
        self.kept: dict[str, dict[int, ast.stmt]] = {}  # by file, in the order in which files may be run; by line
        self.origin: dict[str, str] = {}  # of each name: the file that defines it, or its import

    def names_of(self, file: str) -> dict[str, list[ast.stmt]]:
        """The statements at the top of a file by the names that they bind; those that bind none under ""."""
        if file not in self.tables:
            try:
                tree = ast.parse(self.sources[file])
            except KeyError:
                raise SourceError(f"the record does not embed {file}") from None
            except (SyntaxError, ValueError, RecursionError, MemoryError, TypeError) as error:
                raise SourceError(f"{file} is no Python that can be read here: {type(error).__name__}") from error
            table: dict[str, list[ast.stmt]] = {"": []}
            for node in tree.body:
                for name in bound_names(node):
                    table.setdefault(name, []).append(node)
            self.tables[file] = table
        return self.tables[file]

    def others(self, file: str) -> list[ast.stmt]:
        """Statements that bind no name but may do something when the model's file is imported."""
        return [node for node in self.names_of(file)[""] if not is_guard(node) and not is_text(node)]

    def take(self, file: str, name: str) -> None:
        """What binds the name in the file, if anything there does, with all that it names."""
        for statement in self.names_of(file).get(name, ()):
            if isinstance(statement, ast.Import | ast.ImportFrom):
                self.take_import(file, statement, name)
            elif statement.lineno not in self.kept.get(file, {}):
                self.claim(name, file)
                self.keep(file, statement)

    def claim(self, name: str, origin: str) -> None:
        if self.origin.setdefault(name, origin) != origin:
            raise SourceError(f"{name} is of {self.origin[name]} and of {origin}; rename one")

    def keep(self, file: str, statement: ast.stmt) -> None:
        if statement.lineno in self.kept.get(file, {}):
            return
        own: dict[int, ast.stmt] = {}
        self.kept.setdefault(file, own)[statement.lineno] = statement
        for name in sorted(names_in(statement)):
            self.take(file, name)
        # What it names in other files goes before it.
        self.kept[file] = self.kept.pop(file)

    def take_import(self, file: str, statement: ast.Import | ast.ImportFrom, name: str) -> None:
        alias = next(alias for alias in statement.names if (alias.asname or alias.name.split(".")[0]) == name)
        module = full_name(file, statement)
        if module.split(".")[0] not in PACKAGES if module else alias.name.split(".")[0] not in PACKAGES:
            one = ast.unparse(ast.ImportFrom(module, [alias], 0) if module else ast.Import([alias]))
            self.claim(name, one)
            self.imports[one] = None
            return
        target = module.replace(".", "/") + ".py"
        if not module or target not in self.sources or alias.asname or alias.name == "*":
            raise SourceError(f"{file}: the model uses {name}, which is no definition that can be taken along")
        if alias.name not in self.names_of(target):
            raise SourceError(f"{file}: the model uses {name}, which {target} does not define")
        self.take(target, alias.name)

    def text(self) -> str:
        parts = [part for file, kept in self.kept.items() for part in self.texts(file, kept)]
        return "\n".join(sorted(self.imports)) + "\n\n\n" + "\n\n\n".join(parts) + "\n"

    def texts(self, file: str, kept: Mapping[int, ast.stmt]) -> Iterator[str]:
        """Of statements as they stand in the file, in its order."""
        lines = self.sources[file].split("\n")
        for _, statement in sorted(kept.items()):
            hidden = {line for node in left_out(statement) for line in span(node)}
            text = "\n".join(lines[line - 1] for line in span(statement) if line not in hidden)
            yield text.rstrip()


def bound_names(node: ast.stmt) -> list[str]:
    """The names that a statement at the top of a file surely binds, and no other; [""] if it does something else."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name.split(".")[0] for alias in node.names]
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    flat = [part for target in targets for part in (target.elts if isinstance(target, ast.Tuple) else [target])]
    names = [part.id for part in flat if isinstance(part, ast.Name)]
    return names if names and len(names) == len(flat) else [""]


def is_guard(node: ast.stmt) -> bool:
    """Whether this is a block of a file that is run by itself, or of a type checker."""
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("__name__ == '__main__'", "TYPE_CHECKING")


def is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def left_out(statement: ast.stmt) -> list[ast.stmt]:
    """The parts of a statement that only training needs."""
    if not isinstance(statement, ast.ClassDef) or statement.name != ROOT_CLASS:
        return []
    return [part for part in statement.body if isinstance(part, ast.FunctionDef) and part.name == NOT_OF_INFERENCE]


def names_in(statement: ast.stmt) -> set[str]:
    hidden = {id(part) for node in left_out(statement) for part in ast.walk(node)}
    return {part.id for part in ast.walk(statement) if isinstance(part, ast.Name) and id(part) not in hidden}


def span(node: ast.stmt) -> range:
    """The lines of a statement, its decorators' too."""
    decorators = getattr(node, "decorator_list", [])
    return range(min([node.lineno, *(part.lineno for part in decorators)]), (node.end_lineno or node.lineno) + 1)


def full_name(file: str, statement: ast.Import | ast.ImportFrom) -> str:
    """The module that is imported from, empty for `import x`."""
    if isinstance(statement, ast.Import):
        return ""
    parents = file.split("/")[: -statement.level] if statement.level else []
    return ".".join([*parents, *filter(None, [statement.module])])
