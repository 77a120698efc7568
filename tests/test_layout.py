"""Rules of the layout: a run executes aurora/ alone, scripts/ is for offline work, results/ holds no code."""

import ast
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

# What a module may import at its top, beside Python's own library: the entry of the longest folder that holds it.
ALLOWED = {
    "aurora": {"aurora"},
    "aurora/optim": {"torch", "aurora"},
    "aurora/fast": {"torch", "triton", "aurora"},
    "aurora/trainer": {"torch", "numpy", "aurora"},
    "aurora/tokens": {"numpy", "aurora"},
    "data": {"numpy", "aurora", "data"},
    "scripts": {"numpy", "aurora", "scripts"},
    "scripts/analysis": {"numpy", "scipy", "aurora", "scripts"},
    "scripts/verification": {"aurora", "scripts"},
    "scripts/models": {"torch", "numpy", "aurora", "scripts", "lm_eval"},
    "scripts/benchmarks": {"torch", "numpy", "aurora", "scripts", "train_gpt"},
}
MODULES = sorted(path for folder in ("aurora", "data", "scripts") for path in (ROOT / folder).rglob("*.py"))
NAMES = {path: path.relative_to(ROOT).as_posix() for path in [*MODULES, ROOT / "train_gpt.py"]}


def imports(path, top_level_only=True):
    """The dotted names that a module imports."""
    tree = ast.parse(path.read_text())
    package = list(path.relative_to(ROOT).parent.parts)
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) + 1 - node.level], *filter(None, [node.module])] if node.level else None
            module = ".".join(base) if base else node.module
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def packages(path, top_level_only=True):
    return {name.split(".")[0] for name in imports(path, top_level_only)} - set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", MODULES, ids=NAMES.get)
def test_imports_go_one_way(path):
    folder = max((folder for folder in ALLOWED if NAMES[path].startswith(f"{folder}/")), key=len)
    assert packages(path) <= ALLOWED[folder]


def test_trainer_needs_torch_and_numpy_alone():
    assert packages(ROOT / "train_gpt.py", top_level_only=False) <= {"torch", "numpy", "aurora"}


def test_no_two_modules_import_each_other():
    by_name = {NAMES[path][:-3].replace("/", ".").removesuffix(".__init__"): path for path in NAMES}
    graph = {name: {other for other in imports(path) if other in by_name and other != name}
             for name, path in by_name.items()}  # fmt: skip
    done = set()

    def visit(name, trail):
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for other in graph[name]:
                visit(other, [*trail, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def test_there_is_no_code_among_results_and_configs():
    listed = subprocess.run(["git", "ls-files", "results", "configs"], cwd=ROOT, capture_output=True, text=True).stdout
    assert not [name for name in listed.splitlines() if name.endswith((".py", ".sh"))]


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # importing it fails
import aurora.config, aurora.errors, aurora.trainer.record
import aurora.tokens.loader, aurora.tokens.manifest, aurora.tokens.overlap, aurora.tokens.shards
from pathlib import Path
aurora.config.load_config(Path("configs/quick.toml"), "muon")
run = aurora.trainer.record.read_record(next(Path("results/quick").rglob("*.jsonl")))
assert run.is_done
"""


def test_config_tokens_and_records_need_no_torch():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_analysis_never_imports_torch():
    for path in MODULES:
        if NAMES[path].startswith("scripts/") and not re.search("benchmark|models/", NAMES[path]):
            assert "torch" not in packages(path, top_level_only=False), NAMES[path]


READMES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("**/README.md") if ".venv" not in path.parts)
DOCUMENTS = [*READMES, "CONTRIBUTING.md", "CHANGELOG.md"]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_a_document_names_exist(document):
    text, folder = (ROOT / document).read_text(), (ROOT / document).parent
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (folder / link).exists(), link
    for path in re.findall(r"\b(?:scripts|data|configs|aurora|tests)/[\w./-]+\.(?:py|sh|toml)\b", text):
        assert (ROOT / path).is_file() or path.split("/")[-1].split(".")[0] in ("NAME", "signum"), path
