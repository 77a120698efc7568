"""Aurora as the one optimizer of other people's trainers: they train, save and resume as a plain loop does."""

import importlib.util
import json

import pytest

from tests.conftest import ROOT, start_process, torchrun

TRAINERS = ("transformers", "accelerate", "lightning")


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    if missing := [name for name in TRAINERS if importlib.util.find_spec(name) is None]:
        pytest.skip(f"no {', '.join(missing)}; pip install -e '.[integrations]'")

    def run(trainer, num_processes):
        out = tmp_path_factory.mktemp(trainer)
        launcher = torchrun(num_processes) if num_processes > 1 else []
        command = [*launcher, "tests/integration_driver.py", trainer, out / "losses.json", out / "checkpoints"]
        process = start_process(*map(str, command))
        _, error = process.communicate(timeout=180)  # nothing hangs
        assert process.returncode == 0, error[-3000:]
        return json.loads((out / "losses.json").read_text())

    return run


@pytest.fixture(scope="module")
def expected(train):
    return train("plain", 1)["whole"]


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_trainer_gives_the_losses_of_a_plain_loop_and_resumes_with_them(train, expected, trainer, num_processes):
    found = train(trainer, num_processes)
    assert found["whole"] == pytest.approx(expected, abs=1e-4) and expected[-1] != expected[0]
    assert found["resumed"][4:] == found["whole"][4:], "the loss after resume is that of the uninterrupted run"


SNIPPETS = """
import sys
sys.path[:0] = [".", "tests"]
import torch
from torch.utils.data import DataLoader
import integration_driver as driver
from tests.test_docs import blocks
from aurora import Aurora, param_groups
page = "aurora/optim/README.md"
parts = [block for block in blocks(page, "python") if "model, adamw_lr" in block]
for block in parts[1:]:
    names = {"model": driver.new_model(), "dataset": driver.Rows(), "loader": DataLoader(driver.Rows(), driver.BATCH)}
    exec(block, names | {"torch": torch, "Aurora": Aurora, "param_groups": param_groups, "__name__": "snippet"})
print(len(parts), "snippets")
"""


@pytest.mark.slow
def test_snippets_of_the_page_run(train, tmp_path):
    code = SNIPPETS.replace('".", "tests"', f"{str(ROOT)!r}, {str(ROOT / 'tests')!r}")
    process = start_process("-c", code, cwd=tmp_path)
    out, error = process.communicate(timeout=180)
    assert process.returncode == 0, error[-3000:]
    assert out.splitlines()[-1] == "5 snippets"
