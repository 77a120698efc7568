"""Runs that are killed, stopped, starved and corrupted: nothing lost, nothing silently wrong. Real processes.

FULL_SWEEP=1 takes every combination instead of a choice: some ten minutes on two cores.
"""

import errno
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train_gpt
from aurora.errors import Exit, HarnessError
from aurora.trainer.checkpoint import list_checkpoints, load_checkpoint, newest_checkpoint, save_checkpoint, sha256
from aurora.trainer.ranks import digest
from aurora.trainer.record import read_record
from tests.conftest import (
    OPTIMIZERS,
    ROOT,
    events,
    losses,
    start_process,
    torchrun,
    train_here,
)

FULL = os.environ.get("FULL_SWEEP") == "1"
STEPS = 12


@pytest.fixture(scope="session")
def twin(twelve_steps, launch, tmp_path_factory):
    """What a run that nothing happens to ends with, by optimizer and number of ranks."""
    found = {}

    def get(optimizer, world_size):
        if (optimizer, world_size) not in found:
            out = tmp_path_factory.mktemp("twin")
            outcome = launch(*twelve_steps, "--optimizer", optimizer, "--out", out, world_size=world_size)
            assert outcome.codes == [0] * world_size, outcome.err
            found[optimizer, world_size] = result(out)
        return found[optimizer, world_size]

    return get


def checkpoints(out):
    return list_checkpoints(next(out.glob("*.checkpoints")))


def result(out):
    """Every byte of the state after the last step, every loss, and how the record says it ended."""
    state = load_checkpoint(checkpoints(out)[-1])
    assert state["step"] == STEPS and events(out)[-1]["status"] == "done"
    by_step = dict(losses(out))
    assert {(step, loss) for step, loss in losses(out)} == set(by_step.items())  # a step that was repeated was the same
    return digest(state["training"]), by_step


def cut_and_resume(launch, arguments, cuts, world_sizes):
    """A run stopped by SIGTERM so that it ends segments at these steps, gone on with by so many ranks."""
    for segment, world_size in enumerate(world_sizes):
        fault = f"term:fetch:{cuts[segment] - 1}:{world_size - 1}" if segment < len(cuts) else ""
        outcome = launch(*arguments, *(["--resume"] if segment else []), world_size=world_size, fault=fault)
        assert outcome.codes == [Exit.PREEMPTED if fault else 0] * world_size, outcome.err
        assert not segment or f"resume: from step {cuts[segment - 1]} of" in outcome.out[0]


CUTS = {"first step": [1], "mid-shard": [3], "validation": [4], "shard edge": [5], "after a resume": [6, 7]}
CHAIN = {"all in one run": [1, 3, 4, 5, 6]}
CELLS = [(optimizer, world_size, cut) for optimizer in OPTIMIZERS for world_size in (1, 2, 4) for cut in CUTS]
OFTEN = ("adamw", "aurora")
CHOSEN = [("aurora", 2, cut) for cut in CHAIN]


@pytest.mark.parametrize("optimizer,world_size,cut", CELLS if FULL else CHOSEN)
def test_resume_is_bit_exact(twelve_steps, launch, twin, tmp_path, optimizer, world_size, cut):
    steps = (CUTS | CHAIN)[cut]
    arguments = [*twelve_steps, "--optimizer", optimizer, "--out", tmp_path]
    cut_and_resume(launch, arguments, steps, [world_size] * (len(steps) + 1))
    assert result(tmp_path) == twin(optimizer, world_size)
    assert [e["segment"] for e in events(tmp_path) if e["event"] == "resume"] == list(range(2, len(steps) + 2))
    assert events(tmp_path)[-1]["segments"] == len(steps) + 1


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS if FULL else ["aurora"])
def test_world_size_may_change_at_every_resume(twelve_steps, launch, twin, tmp_path, optimizer):
    """All six changes in one run; that what is loaded is what was saved, bit for bit, is checked by each resume."""
    arguments = [*twelve_steps, "--optimizer", optimizer, "--out", tmp_path]
    cut_and_resume(launch, arguments, [1, 3, 4, 6, 8, 10], [1, 2, 4, 1, 4, 2, 1])
    assert result(tmp_path)[1] == pytest.approx(twin(optimizer, 1)[1], abs=1e-5)


STEP_POINTS = (
    "fetch",
    "forward_backward",
    "micro_step",
    "sum",
    "update",
    "updated",
    "validation",
    "validate_batch",
    "validated",
)
SAVE_POINTS = ("checkpoint_gather", "checkpoint_saved")
FILE_POINTS = ("checkpoint_state", "checkpoint_manifest", "checkpoint_rename", "checkpoint_renamed", "checkpoint_prune")
WEIGHT_POINTS = ("weights", "weights_written")


def test_the_sweep_takes_every_point_of_the_source():
    paths = [ROOT / "train_gpt.py", *(ROOT / "aurora" / "trainer").glob("*.py")]
    text = "".join(path.read_text() for path in paths)
    assert {*STEP_POINTS, *SAVE_POINTS, *FILE_POINTS, *WEIGHT_POINTS, "end", "warm_up"} == set(
        re.findall(r'\.mark\("(\w+)"', text)
    )


def kill_cases():
    """(optimizer, world size, rank, point, step)."""
    for number, optimizer in enumerate(OPTIMIZERS):
        for place, name in enumerate((*STEP_POINTS, *SAVE_POINTS, "end", "warm_up")):
            step = {"end": 12, "warm_up": 0, "validation": 8, "validate_batch": 8, "validated": 8}.get(name, 6)
            for rank in (0, 1):
                if FULL or optimizer in OFTEN and (place + number) % 6 == 0 and rank == place % 2 and place:
                    yield optimizer, 2, rank, name, step
        for place, name in enumerate(FILE_POINTS):
            if FULL or optimizer in OFTEN and place == number:
                yield optimizer, 1 + FULL, 0, name, 9
    yield "muon", 1, 0, "weights_written", 12


@pytest.mark.parametrize("optimizer,world_size,rank,name,step", list(kill_cases()))
def test_kill_9_loses_no_checkpoint_and_resumes_right(
    twelve_steps, launch, twin, tmp_path, optimizer, world_size, rank, name, step
):
    arguments = [*twelve_steps, "--optimizer", optimizer, "--out", tmp_path]
    outcome = launch(*arguments, world_size=world_size, fault=f"kill:{name}:{step}:{rank}")
    others = [code for peer, code in enumerate(outcome.codes) if peer != rank]
    assert outcome.codes[rank] == -signal.SIGKILL and others == [Exit.PEER] * (world_size - 1), outcome.err
    assert world_size == 1 or f"rank {rank} (process " in outcome.err[1 - rank]
    kept = [load_checkpoint(path)["step"] for path in (checkpoints(tmp_path) if name != "warm_up" else [])]
    is_before = name in ("checkpoint_gather", "checkpoint_state", "checkpoint_manifest", "checkpoint_rename")
    committed = [s for s in (3, 6, 9, 12) if s < step or (s == step and not is_before)]
    assert kept[-2:] == committed[-2:]
    outcome = launch(*arguments, "--resume", world_size=world_size)
    assert outcome.codes == [0] * world_size, outcome.err
    assert (f"from step {kept[-1]} of" if kept else "starting at step 0") in outcome.out[0]
    if kept:
        assert result(tmp_path) == twin(optimizer, world_size)
    assert not list(tmp_path.glob("*.checkpoints/.step-*"))


def test_a_checkpoint_gets_its_name_when_all_of_it_is_on_the_disk(tmp_path, monkeypatch):
    """Only a power cut would show it otherwise."""
    calls, fsync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda handle: calls.append(os.fstat(handle).st_ino) or fsync(handle))
    monkeypatch.setattr(os, "rename", lambda *paths: calls.append("rename") or rename(*paths))
    save_checkpoint(tmp_path / "x.checkpoints", 3, {"training": torch.ones(3)})
    paths = [tmp_path, *tmp_path.rglob("*")]
    names = {path.stat().st_ino: path.name for path in paths} | {"rename": "rename", tmp_path.stat().st_ino: "out"}
    synced = ["state.pt", "manifest.json", "step-000003"]
    assert [names[call] for call in calls] == ["out", *synced, "rename", "x.checkpoints"]


def test_checkpoints_that_resume_passed_over_are_not_kept_instead_of_good_ones(twelve_steps, launch, saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "out")
    flip(checkpoints(tmp_path / "out")[-1] / "state.pt", 5000, 1)
    outcome = launch(*twelve_steps, "--out", tmp_path / "out", "--resume", fault="term:fetch:9")
    assert outcome.codes == [Exit.PREEMPTED] and "step-000012 is damaged" in outcome.out[0]
    assert [load_checkpoint(path)["step"] for path in checkpoints(tmp_path / "out")] == [9, 10]


@pytest.fixture(scope="session")
def saved(twelve_steps, tmp_path_factory):
    """Folder of an unfinished run with checkpoints of steps 9 and 12, and its run event."""
    out = tmp_path_factory.mktemp("saved")
    assert train_here(twelve_steps[1], out, "--optimizer", "aurora") == 0
    start = events(out)[0] | {"config": load_checkpoint(checkpoints(out)[-1])["identity"]["config"]}  # with its tuples
    next(out.glob("*.jsonl")).unlink()
    return out, start


def corruptions(folder):
    """(description, function that does it) over the files of a checkpoint."""
    generator = random.Random(0)
    for number in range(200):
        file = folder / ("manifest.json" if number % 10 == 0 else "state.pt")
        place, bit = generator.randrange(file.stat().st_size), generator.randrange(8)
        yield f"bit {bit} of byte {place} of {file.name}", lambda f=file, p=place, b=bit: flip(f, p, b)
    for number in range(20):
        file = folder / ("manifest.json" if number % 10 == 0 else "state.pt")
        size = generator.randrange(file.stat().st_size)
        yield f"{file.name} cut at {size}", lambda f=file, s=size: os.truncate(f, s)
    for name in ("state.pt", "manifest.json"):
        yield f"no {name}", lambda f=folder / name: f.unlink()
    yield "no file", lambda: [path.unlink() for path in folder.iterdir()]


def flip(file, place, bit):
    content = bytearray(file.read_bytes())
    content[place] ^= 1 << bit
    file.write_bytes(content)


def test_every_corruption_is_found_and_the_one_before_taken(saved, tmp_path):
    out, start = saved
    shutil.copytree(out, tmp_path / "out")
    newest = checkpoints(tmp_path / "out")[-1]
    originals = {path: path.read_bytes() for path in newest.iterdir()}
    count = 0
    for description, corrupt in corruptions(newest):
        said = []
        corrupt()
        state = newest_checkpoint(tmp_path / "out", start, said.append)
        assert state["step"] == 9 and f"{newest.name} is damaged" in said[0], description
        for path, content in originals.items():
            path.write_bytes(content)
        count += 1
    assert count == 223 and newest_checkpoint(tmp_path / "out", start, print)["step"] == 12


def hostile_contents(tmp_path, state):
    class Bomb:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'executed')!r}, 'w')",))

    def saved_by_torch(value, **options):
        torch.save(value, tmp_path / "made", **options)
        return (tmp_path / "made").read_bytes()

    return {
        "pickle": pickle.dumps(Bomb()),
        "torch.save": saved_by_torch({"training": Bomb()}),
        "old torch.save": saved_by_torch([Bomb()], _use_new_zipfile_serialization=False),
        "one key": saved_by_torch(state | {"run_id": Bomb()}),
        "whole module": saved_by_torch(torch.nn.Linear(2, 2)),
        "protocol 0": pickle.dumps(Bomb(), protocol=0),
        "text": b"hello",
        "nothing": b"",
        "list": saved_by_torch([1, 2]),
        "missing keys": saved_by_torch({"step": 12}),
        "absolute step": saved_by_torch(state | {"step": 10**9}),
    }


def test_hostile_checkpoints_are_refused_and_nothing_is_executed(saved, tmp_path):
    out, start = saved
    for name, content in hostile_contents(tmp_path, load_checkpoint(checkpoints(out)[-1])).items():
        folder = tmp_path / name / f"{start['run_id']}.checkpoints" / "step-000012"
        folder.mkdir(parents=True)
        (folder / "state.pt").write_bytes(content)
        manifest = {"sha256": sha256(folder / "state.pt"), "bytes": len(content), "step": 12}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        (folder.parent / "step-x").mkdir()
        with pytest.raises(HarnessError, match="are damaged; restore it, or start over"):
            newest_checkpoint(tmp_path / name, start, lambda line: None)
    assert not (tmp_path / "executed").exists()


def rewrite(folder, change):
    """Change what is in a checkpoint, and make its manifest fit."""
    state = torch.load(folder / "state.pt", weights_only=True)
    change(state)
    torch.save(state, folder / "state.pt")
    size, step = (folder / "state.pt").stat().st_size, state["step"]
    manifest = {"sha256": sha256(folder / "state.pt"), "bytes": size, "step": step}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s["training"]["optimizers"][0]["state"].pop(20),
        lambda s: s["training"]["optimizers"][0]["state"].pop(3),
        lambda s: [o["state"].clear() for o in s["training"]["optimizers"]],
        lambda s: s["training"]["optimizers"][0]["param_groups"][0].update(algorithm="Muon"),
        lambda s: s["training"]["model"].pop("embed.weight"),
        lambda s: s["training"]["model"].update({"embed.weight": s["training"]["model"]["embed.weight"].bfloat16()}),
        lambda s: s["training"]["optimizers"][0]["state"][20].update(exp_avg=torch.zeros(2)),
        lambda s: s["training"]["optimizers"][0]["state"][20].pop("step"),
        lambda s: s["training"]["optimizers"][0]["state"][0].update(momentum_buffer=torch.zeros(2)),
    ],
)
def test_whole_checkpoints_with_wrong_content_are_refused(saved, twelve_steps, tmp_path, capsys, change):
    shutil.copytree(saved[0], tmp_path / "out")
    rewrite(checkpoints(tmp_path / "out")[-1], change)
    assert train_here(twelve_steps[1], tmp_path / "out", "--optimizer", "aurora", "--resume") == Exit.CHECKPOINT
    assert "the checkpoint does not fit this run" in capsys.readouterr().err


def test_resume_takes_over_the_dtype_that_auto_meant(twelve_steps, tmp_path, monkeypatch):
    arguments = ["--optimizer", "muon", "--set", "optimizer.muon.polar_dtype=auto"]
    monkeypatch.setattr(train_gpt.aurora, "compute_dtype", lambda name, device: torch.bfloat16)
    assert train_here(twelve_steps[1], tmp_path, *arguments) == 0
    monkeypatch.undo()
    end = losses(tmp_path)
    next(tmp_path.glob("*.jsonl")).unlink()
    shutil.rmtree(checkpoints(tmp_path)[-1])
    monkeypatch.setattr(train_gpt.aurora, "compute_dtype", lambda name, device: torch.float32)
    assert train_here(twelve_steps[1], tmp_path, *arguments, "--resume") == 0
    (optimizer,) = load_checkpoint(checkpoints(tmp_path)[-1])["training"]["optimizers"]
    group = optimizer["param_groups"][0]
    assert group["polar_dtype"] == "bfloat16" and losses(tmp_path)[-1] == end[-1]


BAD = [(kind, name, rank, size) for size in (1, 2, 4) for rank in {0, size - 1} for kind in ("nan", "inf")
       for name in ("loss", "gradient", "sum")]  # fmt: skip
BAD_OFTEN = [("nan", "loss", 1, 2), ("inf", "gradient", 0, 2), ("nan", "sum", 1, 2)]


TELL_WEIGHTS = """
from aurora.trainer import journal
from aurora.trainer.ranks import digest
original = journal.end_event
def end_event(status, run):
    print('weights:', digest(run.model.state_dict()), flush=True)
    return original(status, run)
journal.end_event = end_event
"""


@pytest.mark.parametrize("kind,name,rank,world_size", BAD if FULL else BAD_OFTEN)
def test_non_finite_numbers_stop_all_ranks(twelve_steps, launch, tmp_path, kind, name, rank, world_size):
    """In the loss, in a gradient, in what the update is made of: before the update."""
    fault = f"{kind}:{name}:6:{rank}"
    arguments = [*twelve_steps, "--optimizer", "aurora", "--out", tmp_path]
    outcome = launch(*arguments, world_size=world_size, fault=fault, patch=TELL_WEIGHTS)
    assert outcome.codes == [Exit.NON_FINITE] * world_size, outcome.err
    newest, end = load_checkpoint(checkpoints(tmp_path)[-1]), events(tmp_path)[-1]
    assert newest["step"] == 6 and end["status"] == "diverged"
    assert all(p.isfinite().all() for p in newest["training"]["model"].values())
    assert "step 7: " in outcome.err[0]
    weights = digest(newest["training"]["model"])
    assert end["weights_sha256"] == weights and all(f"weights: {weights}" in text for text in outcome.out)
    if name != "loss":
        what = "sum of gradients: blocks." if name == "sum" and world_size > 1 else "gradient: "
        assert f"first bad {what}" in outcome.err[0]
        assert world_size == 1 or f"on rank {rank};" in outcome.err[0]


FIELDS = {
    "code_hash": "{'code_hash': 'other'}",
    "config": "{'config': {**event['config'], 'warmup_steps': 7}}",
    "data": "{'data': {**event['data'], 'fingerprint': 'other'}}",
    "val": "{'data': {**event['data'], 'val_sha256': 'other'}}",
    "seed": "{'seed': 7}",
    "torch": "{'env': {**event['env'], 'torch': '2.0'}}",
    "env": "{'env': {**event['env'], 'variables': {'NCCL_ALGO': 'Tree'}}}",
}


@pytest.mark.parametrize("field", FIELDS if FULL else ["code_hash", "val", "torch", "env"])
def test_ranks_that_differ_are_named_before_the_first_step(twelve_steps, launch, tmp_path, field):
    patch = (
        "from aurora.trainer import setup\n"
        "original = setup.run_event\n"
        f"def other(*args):\n    event = original(*args)\n    return event | {FIELDS[field]}\n"
        "if rank == 1: setup.run_event = other"
    )
    outcome = launch(*twelve_steps, "--out", tmp_path, world_size=2, patch=patch)
    assert outcome.codes == [Exit.RANKS_DISAGREE] * 2
    assert f"error: rank 1 has {field}" in outcome.err[0] and not list(tmp_path.glob("*.jsonl"))


def test_a_rank_that_cannot_start_says_why(twelve_steps, launch, tmp_path):
    """A config that only one node lacks."""
    patch = (
        "from aurora.trainer import setup\n"
        "def fail(*args): raise setup.HarnessError(setup.Exit.CONFIG, 'no such config')\n"
        "if rank == 1: setup.read_track = fail"
    )
    outcome = launch(*twelve_steps, "--out", tmp_path, world_size=2, patch=patch)
    assert outcome.codes == [Exit.CONFIG] * 2 and outcome.err[0] == "error: on rank 1: no such config\n"


def test_more_ranks_than_gpus_is_told_by_the_rank_that_has_none(twelve_steps, tmp_path, monkeypatch, capsys):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "SPEEDRUN_DEVICE": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert train_here(twelve_steps[1], tmp_path) == Exit.CONFIG
    assert "rank 1 wants GPU 1, but this node has 1: start at most 1" in capsys.readouterr().err


def test_one_ulp_of_drift_is_found_at_the_next_validation(twelve_steps, launch, tmp_path):
    outcome = launch(*twelve_steps, "--out", tmp_path, world_size=2, fault="ulp:updated:5:1")
    assert outcome.codes == [Exit.RANKS_DISAGREE] * 2 and "error: rank 1 has weights = " in outcome.err[0]
    assert [step for step, _ in losses(tmp_path)] == [0, 4] and load_checkpoint(checkpoints(tmp_path)[-1])["step"] == 3


HANGS = [(kind, name, rank, size) for kind in ("stop", "hang") for name in ("micro_step", "update", "validated")
         for size in (2, 4) for rank in (0, 1)]  # fmt: skip


@pytest.mark.parametrize(
    "kind,name,rank,world_size", HANGS if FULL else [("stop", "update", 0, 2), ("hang", "micro_step", 1, 2)]
)
def test_a_rank_that_hangs_is_named_and_the_job_ends(twelve_steps, launch, tmp_path, kind, name, rank, world_size):
    arguments = [*twelve_steps, "--timeout-s", "2", "--out", tmp_path]
    outcome = launch(*arguments, world_size=world_size, fault=f"{kind}:{name}:4:{rank}", timeout_s=30)
    assert set(outcome.codes) <= {Exit.PEER, -signal.SIGKILL} and Exit.PEER in outcome.codes
    survivor = next(peer for peer, text in enumerate(outcome.err) if "gives up: " in text)
    found = re.search(r"gives up: (.*)", outcome.err[survivor])[1]
    assert f"rank {rank} (process " in found and (kind == "stop" or f"at step 5, {name}" in found)
    begin_s = (launch.folder / "out0").stat().st_mtime  # the last line is that of the validation at step 4
    assert (launch.folder / f"err{survivor}").stat().st_mtime - begin_s <= 2 + 1
    assert max(outcome.ended_s) - begin_s <= 2 + 7


LOST_UNHEARD = """
import signal, time
if rank == 1:
    from aurora.trainer.watch import Watch
    Watch.run = lambda self: None  # its thread has not had its turn yet
original = train_gpt.train_step
def step(run, model, number, *rest):
    if number == 4:
        os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else time.sleep(600)
    return original(run, model, number, *rest)
train_gpt.train_step = step
"""


def test_a_rank_that_dies_is_named_where_the_collective_does_not_tell(twelve_steps, launch, tmp_path):
    """As with NCCL: who waits for a dead peer gets no error."""
    arguments = [*twelve_steps, "--timeout-s", "20", "--out", tmp_path]
    outcome = launch(*arguments, world_size=2, patch=LOST_UNHEARD, timeout_s=30)
    assert outcome.codes == [Exit.PEER, -signal.SIGKILL]
    assert re.search(r"gives up: rank 1 \(process \d+ on .*\) has not answered", outcome.err[0])
    assert outcome.ended_s[0] - outcome.ended_s[1] <= 10, "long before the timeout"


STOPS = {"sum:5:1": 6, "validate_batch:4:1": 5, "checkpoint_gather:3:1": 4, "checkpoint_state:3:0": 4}


@pytest.mark.parametrize("place,step", STOPS.items() if FULL else list(STOPS.items())[::3])
def test_a_stop_on_one_rank_stops_all_at_the_same_step(twelve_steps, launch, tmp_path, place, step):
    """In a step, in a validation, in a checkpoint."""
    outcome = launch(*twelve_steps, "--out", tmp_path, world_size=2, fault=f"term:{place}")
    assert outcome.codes == [Exit.PREEMPTED] * 2 and load_checkpoint(checkpoints(tmp_path)[-1])["step"] == step
    assert max(outcome.ended_s) - (launch.folder / "out0").stat().st_mtime <= 5  # since the last line before the signal


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_workers_die_with_their_launcher(twelve_steps, tmp_path, world_size):
    """One rank alone has no watch, only the kernel."""
    command = ["train_gpt.py", *map(str, twelve_steps), "--out", str(tmp_path), "--timeout-s", "60"]
    process = start_process(*torchrun(world_size), *command, env={"SPEEDRUN_FAULT": "hang:fetch:3"})
    for line in process.stdout:
        if line.startswith("step:0/"):
            break
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    assert len(workers) >= world_size
    process.kill()
    process.wait()
    deadline_s = time.monotonic() + 5
    while any(is_alive(pid) for pid in workers) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert not any(is_alive(pid) for pid in workers)


def is_alive(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


LIMIT = "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
SMALL_FILES = LIMIT + "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, -1))"
SHORT_WRITES = (
    "import aurora.trainer.record\n"
    "original = os.write\n"
    "def write(handle, line):\n"
    "    full = rank == 0 and b'\"step\": 8' in line\n"
    "    return original(handle, line[:20] if full else line)\n"
    "os.write = write"
)
FULL_DISKS = [(size, f"full:{name}:6", "") for size in (1, 2) for name in FILE_POINTS[:4]]
FULL_DISKS += [(1, "", SHORT_WRITES), (2, "", SHORT_WRITES)]


@pytest.mark.parametrize("world_size,fault,patch", FULL_DISKS if FULL else FULL_DISKS[7:8] + FULL_DISKS[9:])
def test_a_full_disk_leaves_the_last_good_state(twelve_steps, launch, twin, tmp_path, world_size, fault, patch):
    arguments = [*twelve_steps, "--optimizer", "aurora", "--out", tmp_path]
    outcome = launch(*arguments, world_size=world_size, fault=fault, patch=patch)
    assert outcome.codes == [Exit.DISK] * world_size and "cannot be written" in outcome.err[0]
    assert load_checkpoint(checkpoints(tmp_path)[-1])["step"] == (6 if patch or "renamed" in fault else 3)
    assert read_record(next(tmp_path.glob("*.jsonl"))).end is None
    outcome = launch(*arguments, "--resume", world_size=world_size)
    assert outcome.codes == [0] * world_size and result(tmp_path) == twin("aurora", world_size)


def test_a_file_that_may_not_grow_is_a_full_disk(twelve_steps, launch, tmp_path):
    """torch.save then raises a RuntimeError, not an OSError."""
    outcome = launch(*twelve_steps, "--out", tmp_path, patch=SMALL_FILES)
    assert outcome.codes == [Exit.DISK] and "cannot be written" in outcome.err[0]
    assert not list(tmp_path.glob("*.checkpoints/*"))


@pytest.mark.parametrize("fault,code,status", [("", 0, "done"), ("nan:gradient:6", Exit.NON_FINITE, "diverged")])
def test_a_full_console_changes_nothing(twelve_steps, launch, tmp_path, fault, code, status):
    patch = "full = os.open('/dev/full', os.O_WRONLY)\nos.dup2(full, 1), os.dup2(full, 2)"
    outcome = launch(*twelve_steps, "--out", tmp_path, fault=fault, patch=patch)
    assert outcome.codes == [code] and events(tmp_path)[-1]["status"] == status


@pytest.mark.parametrize("number, code", [(errno.ENOSYS, 0), (errno.ENOLCK, 0), (errno.EIO, Exit.DISK)])
def test_a_disk_without_locks_is_warned_of_and_a_broken_one_refused(
    twelve_steps, tmp_path, monkeypatch, capsys, number, code
):
    def flock(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("aurora.trainer.process.fcntl.flock", flock)
    arguments = ["--set", "train.steps=2", "--set", "optimizer.aurora.warmup_steps=0"]
    assert train_here(twelve_steps[1], tmp_path, *arguments) == code
    said = capsys.readouterr().err
    assert ("is on a disk without locks; take care" if code == 0 else "Input/output error; remove it or") in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("kind", ["symlink", "hard link", "pipe", "folder"])
def test_a_lock_that_leads_elsewhere_is_refused_and_its_target_kept(twelve_steps, tmp_path, capsys, kind):
    precious, lock = tmp_path / "precious", tmp_path / "out" / ".lock"
    precious.write_text("do not lose this")
    lock.parent.mkdir()
    make = {"symlink": lambda: lock.symlink_to(precious), "hard link": lambda: os.link(precious, lock)}
    (make | {"pipe": lambda: os.mkfifo(lock), "folder": lock.mkdir})[kind]()
    assert train_here(twelve_steps[1], lock.parent) == Exit.DISK
    assert "its file .lock cannot be written and locked" in capsys.readouterr().err
    assert precious.read_text() == "do not lose this"


def test_of_eight_runs_in_one_folder_one_wins(twelve_steps, launch, tmp_path):
    """The winner trains when seven have been refused."""
    patch = (
        "import glob, time\n"
        "os.environ.update(RANK='0', WORLD_SIZE='1')\n"
        "original = train_gpt.train_steps\n"
        "def wait(*args):\n"
        "    deadline_s = time.monotonic() + 20\n"
        f"    while sum('is in use' in open(f).read() for f in glob.glob({str(launch.folder)!r} + '/err*')) < 7:\n"
        "        assert time.monotonic() < deadline_s\n"
        "        time.sleep(0.05)\n"
        "    return original(*args)\n"
        "train_gpt.train_steps = wait"
    )
    for old in launch.folder.glob("err*"):
        old.unlink()
    outcome = launch(*twelve_steps, "--out", tmp_path, world_size=8, patch=patch)
    assert sorted(outcome.codes) == [0] + [Exit.CONFIG] * 7
    refusals = [text for text in outcome.err if re.search(r"is in use by process \d+ on ", text)]
    assert len(refusals) == 7 and read_record(next(tmp_path.glob("*.jsonl"))).is_done
    assert train_here(twelve_steps[1], tmp_path) == 0  # one after the other they may


STAMPS = """
import time
from aurora.trainer import journal
begin_s = time.monotonic()
def stamped(train):
    def run(*args):
        global inner_s
        inner_s = time.monotonic()
        return train(*args)
    return run
def bracketed(end_event):
    def run(*args):
        least_s = time.monotonic() - inner_s
        event = end_event(*args)
        print('wall between', least_s, time.monotonic() - begin_s, flush=True)
        return event
    return run
train_gpt.train, journal.end_event = stamped(train_gpt.train), bracketed(journal.end_event)
"""


def test_a_slow_rank_counts_and_the_accounts_add_up_to_the_wall(twelve_steps, launch, tmp_path):
    """The wall is also measured from within and from around what the clock sees, which load cannot bring apart."""
    outcome = launch(*twelve_steps, "--out", tmp_path, world_size=2, fault="sleep:fetch:6:1", patch=STAMPS)
    assert outcome.codes == [0, 0], outcome.err
    end = events(tmp_path)[-1]
    assert end["train_time_s"] >= 0.5
    assert end["train_time_s"] + sum(end["untimed"].values()) == pytest.approx(end["wall_s"], rel=1e-9)
    brackets = [re.search(r"wall between (\S+) (\S+)", text) for text in outcome.out]
    least_s, most_s = min(float(found[1]) for found in brackets), max(float(found[2]) for found in brackets)
    assert 0.5 < least_s <= end["wall_s"] - end["untimed"]["import_s"] <= most_s


LATE = """
import pathlib, time
from aurora.trainer.clock import Clock
from aurora.trainer.timeline import timeline
arrived, read = pathlib.Path({arrived!r}), Clock.charge
def at(name, step):
    if (name, step, rank) == ('validated', 4, 1):
        time.sleep(0.5)
        arrived.touch()
def charge(clock, account):
    read(clock, account)
    if (account, timeline.place.step) == ('val', 4):
        print('read when rank 1 had', 'arrived' if arrived.exists() else 'not arrived')
timeline.subscribe(at)
Clock.charge = charge
"""


def test_no_clock_is_read_before_all_ranks_have_arrived(twelve_steps, launch, tmp_path):
    """Half a second that one rank loses off the clock must not be waited for by the others on it."""
    patch = LATE.format(arrived=str(tmp_path / "arrived"))
    outcome = launch(*twelve_steps, "--out", tmp_path, "--set", "train.steps=5", world_size=2, patch=patch)
    assert outcome.codes == [0, 0] and all("rank 1 had arrived" in text for text in outcome.out), outcome.err


def launch_script(*arguments, **environment):
    """scripts/launch.sh on two ranks, started."""
    paths = os.pathsep.join([str(ROOT / "tests" / "faulty"), str(ROOT)])
    environment = os.environ | {"NPROC": "2", "PYTHONPATH": paths} | environment
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", "scripts/launch.sh", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, cwd=ROOT, text=True, **pipes)


@pytest.mark.slow
def test_launch_script_goes_on_after_a_lost_rank(twelve_steps, twin, tmp_path):
    arguments = [*twelve_steps, "--optimizer", "aurora", "--out", tmp_path]
    run = launch_script(*arguments, SPEEDRUN_FAULT="kill:update:7:1", RETRIES="1")
    _, said = run.communicate(timeout=120)
    assert run.returncode == 0 and said.count("launch: lost a rank, going on") == 1, said
    assert result(tmp_path) == twin("aurora", 2) and events(tmp_path)[-1]["segments"] == 2


@pytest.mark.slow
def test_launch_script_hands_on_sigterm_and_the_exit_code(twelve_steps, tmp_path):
    changes = {"data.allow_epochs": "true", "train.steps": 3000, "train.checkpoint_every": 0}
    overrides = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    run = launch_script(*twelve_steps, *overrides, "--out", tmp_path)
    while not run.stdout.readline().startswith("step:0/"):
        assert run.poll() is None
    begin_s = time.time()
    run.terminate()
    _, said = run.communicate(timeout=120)
    assert run.returncode == Exit.PREEMPTED and "launch:" not in said, said
    assert next(tmp_path.glob("*.jsonl")).stat().st_mtime - begin_s <= 5  # the end event follows the checkpoint
    (newest,) = checkpoints(tmp_path)
    end = events(tmp_path)[-1]
    assert end["status"] == "interrupted" and end["step"] == load_checkpoint(newest)["step"]
