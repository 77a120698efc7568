"""What a run imports is what its record embeds, and a rule of one's own costs nobody else's runs anything."""

import json
import shutil
import subprocess
import sys

import pytest

from tests.conftest import OPTIMIZERS, ROOT, tiny_table
from tests.test_registry import rule_of

IMPORTED = """
import json, sys
from pathlib import Path
import train_gpt
code = train_gpt.main(sys.argv[2:])
root = Path(train_gpt.__file__).parent
files = {Path(getattr(module, "__file__", None) or "").resolve() for module in sys.modules.values()}
files = {file for file in files if file.is_relative_to(root) and file.suffix == ".py" and file.is_file()}
below = {file.relative_to(root).as_posix() for file in files if "site-packages" not in file.parts}
Path(sys.argv[1]).write_text(json.dumps(sorted(below)))
sys.exit(code)
"""


SLOW = pytest.mark.slow


@pytest.mark.parametrize("optimizer", [pytest.param(name, marks=SLOW) for name in ("adamw", "unormuon", "aurora")])
def test_a_record_embeds_what_its_run_imported_from_beginning_to_end(tiny_track, tmp_path, optimizer):
    command = [sys.executable, "-c", IMPORTED, tmp_path / "imported.json", "--config", tiny_track, "--out", tmp_path]
    command += ["--optimizer", optimizer, "--set", "train.steps=4", "--set", "train.checkpoint_every=2"]
    command += ["--set", "train.micro_batch=auto"]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    start = json.loads(next(tmp_path.glob("*.jsonl")).read_text().splitlines()[0])
    imported = json.loads((tmp_path / "imported.json").read_text())
    assert sorted(start["sources"]) == sorted([*imported, "tiny.toml"])
    assert {"train_gpt.py", "aurora/__init__.py", f"aurora/optim/{optimizer}.py"} <= set(imported)
    others = {f"aurora/optim/{name}.py" for name in OPTIMIZERS} - set(imported)
    assert len(others) == len(OPTIMIZERS) - {"adamw": 1, "unormuon": 2, "aurora": 1}[optimizer]


def test_a_rule_dropped_in_is_compared_and_repeats_no_run_of_another(tiny_track, tmp_path):
    checkout, out = tmp_path / "checkout", tmp_path / "out"
    for name in ("aurora", "scripts"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train_gpt.py", checkout)
    track = checkout / "tiny.toml"
    track.write_text(tiny_track.read_text() + tiny_table("signum"))

    def compare(*optimizers):
        command = [sys.executable, "scripts/compare.py", "--config", "tiny.toml", "--set", "train.steps=10"]
        command += ["--out", str(out), "--optimizers", *optimizers]
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    command = [sys.executable, "train_gpt.py", "--config", "tiny.toml", "--optimizer", "muon", "--seed", "0"]
    command += ["--set", "train.steps=10", "--out", str(out)]
    assert subprocess.run(command, cwd=checkout, capture_output=True).returncode == 0
    (checkout / "aurora" / "optim" / "signum.py").write_text(rule_of("README.md"))
    assert compare("muon", "signum").count("finished before") == 1 and len(list(out.glob("*.jsonl"))) == 2
    assert len(list(out.glob("*signum*.jsonl"))) == 1 and "signum" in (out / "comparison.md").read_text()
