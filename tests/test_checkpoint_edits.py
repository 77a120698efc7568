"""Checkpoints that are whole, but edited: refused with exit 4, or the run goes on as it would have. No traceback."""

import copy
import math
import random
import shutil
import time

import pytest
import torch

from aurora.errors import Exit
from aurora.trainer.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from aurora.trainer.ranks import digest
from tests.conftest import often, train_here


@pytest.fixture(scope="module")
def stopped(twelve_steps, tmp_path_factory):
    """Folder of a run that was stopped before its end event, with one checkpoint."""
    out = tmp_path_factory.mktemp("stopped")
    assert train_here(twelve_steps[1], out, "--optimizer", "aurora", "--set", "train.micro_batch=auto") == 0
    (record,) = out.glob("*.jsonl")
    record.write_text("".join(record.read_text().splitlines(keepends=True)[:-1]))
    shutil.rmtree(list_checkpoints(next(out.glob("*.checkpoints")))[0])
    return out


def places(value, path=()):
    """Where something may be edited: all keys and indices but those of long lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else []
    for key, entry in items:
        yield (*path, key)
        yield from places(entry, (*path, key))


def edited(value, generator):
    """Another value."""
    if isinstance(value, torch.Tensor):
        floats = [value * math.nan, value.tolist(), value.double(), value[:0] if value.ndim else value[None]]
        return generator.choice([value + 1, *(floats if value.is_floating_point() else [value[:-1], None])])
    odd = [None, "x", [], {}, -1, 10**30, math.nan, "../../x", True]
    if isinstance(value, bool):
        return generator.choice([not value, int(value), *odd[:4]])
    if isinstance(value, int | float):
        return generator.choice([value + 1, value * 2 + 1, str(value), float(value) + 0.5, *odd])
    if isinstance(value, str):
        return generator.choice([value + "1", value[:-1], value[::-1], *odd])
    if isinstance(value, list | tuple):
        return generator.choice([value[:-1], [*value, *value[:1]], list(value[::-1]), *odd])
    return generator.choice([{}, value | {"extra": 1}, *odd])


def put(state, path, change):
    """Change or delete what is at the path."""
    *parents, key = path
    holder, above = state, []
    for parent in parents:
        above.append((holder, parent))
        holder = holder[parent]
    if isinstance(holder, tuple):  # which cannot be changed in place
        holder = list(holder)
        above[-1][0][above[-1][1]] = holder
    change(holder, key)


def edit(state, number):
    """A copy with one edit, and its description."""
    generator, state = random.Random(number), copy.deepcopy(state)
    found = [path for path in places(state) if "code" not in path[:-1] and path[0] != "sha256"]
    by_part = {}
    for path in found:
        by_part.setdefault(path[:2] if path[0] == "training" else path[:1], []).append(path)
    path = generator.choice(by_part[generator.choice(sorted(by_part, key=str))])
    if generator.random() < 0.15:
        put(state, path, lambda holder, key: holder.pop(key))
        return state, f"no {path}"
    put(state, path, lambda holder, key: holder.__setitem__(key, edited(holder[key], generator)))
    return state, f"another {path}"


RESEALED = {
    "steps": lambda s: s.update(step=11),
    "loader": lambda s: s["training"]["loader"].update(step=7),
    "lr": lambda s: s["training"]["optimizers"][0]["param_groups"][0].update(peak_lr=0.5),
    "momentum": lambda s: s["training"]["optimizers"][0]["param_groups"][0].update(momentum=0.5),
    "type": lambda s: s["training"]["optimizers"][0]["param_groups"][1].update(eps="1e-10"),
    "unknown key": lambda s: s["training"].update(more=1),
    "AdamW's step": lambda s: s["training"]["optimizers"][0]["state"][20]["step"].fill_(3),
    "NaN": lambda s: s["training"]["model"]["head.weight"].fill_(math.nan),
    "loss": lambda s: s["validations"].__setitem__(-1, (*s["validations"][-1][:1], 1.5, s["validations"][-1][2])),
    "validation left out": lambda s: s["validations"].pop(1),
    "clock": lambda s: s["spent_ns"].update(train=-5),
    "clock goes back": lambda s: s["spent_ns"].update(train=5),
    "account": lambda s: s["spent_ns"].update(more=5),
    "segments": lambda s: s.update(segments="two"),
    "run_id": lambda s: s.update(run_id="../../elsewhere"),
    "micro-batch": lambda s: s.update(micro_batch=3),
}


@pytest.mark.parametrize("case", RESEALED)
def test_edits_that_contradict_the_run_are_found_even_with_a_new_hash(stopped, twelve_steps, tmp_path, capsys, case):
    out = shutil.copytree(stopped, tmp_path / "out")
    (folder,) = list_checkpoints(next(out.glob("*.checkpoints")))
    state = load_checkpoint(folder)
    del state["sha256"]
    RESEALED[case](state)
    resume(state | {"sha256": digest(state)}, folder, twelve_steps, out)
    said = capsys.readouterr().err
    assert said.startswith("error: --resume: ") and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def resume(state, folder, twelve_steps, out, codes=(Exit.CHECKPOINT,)):
    step = state["step"] if type(state.get("step")) is int and 0 < state["step"] < 10**9 else 12
    shutil.rmtree(folder)
    save_checkpoint(folder.parent, step, state)
    code = train_here(twelve_steps[1], out, "--optimizer", "aurora", "--set", "train.micro_batch=auto", "--resume")
    assert code in codes
    return code


@pytest.mark.parametrize("numbers", [range(8), often(range(8, 308), False)])
def test_no_edit_is_a_traceback_or_taken_in_silence(stopped, twelve_steps, tmp_path, capsys, numbers):
    (folder,) = list_checkpoints(next(stopped.glob("*.checkpoints")))
    whole = load_checkpoint(folder)
    for number in numbers:
        state, description = edit(whole, number)
        out = shutil.copytree(stopped, tmp_path / "out")
        code = resume(state, out / folder.relative_to(stopped), twelve_steps, out, (0, Exit.CHECKPOINT))
        assert "Traceback" not in capsys.readouterr().err
        if code == 0:
            assert digest(state) == digest(whole), description
        shutil.rmtree(out)


def test_resume_takes_the_run_that_is_furthest_not_the_newest_name(twelve_steps, launch, tmp_path):
    """As where the clock went back between two starts."""
    outcome = launch(*twelve_steps, "--out", tmp_path / "far", fault="term:fetch:8")
    assert outcome.codes == [Exit.PREEMPTED]
    time.sleep(1)  # which names count in
    outcome = launch(*twelve_steps, "--out", tmp_path / "near", fault="term:fetch:3")
    for path in (tmp_path / "near").iterdir():
        shutil.move(path, tmp_path / "far" / path.name)
    (far,) = [path for path in (tmp_path / "far").glob("*.checkpoints") if (path / "step-000009").exists()]
    (near,) = [path for path in (tmp_path / "far").glob("*.checkpoints") if path != far]
    assert near.name > far.name
    outcome = launch(*twelve_steps, "--out", tmp_path / "far", "--resume")
    assert outcome.codes == [0] and f"resume: from step 9 of {far.stem}" in outcome.out[0]
