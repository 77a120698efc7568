"""Records are verified: honest ones pass, tampered and broken ones get a verdict, hostile ones harm nothing."""

import contextlib
import copy
import json
import os
import random
import re
import subprocess
import time
import tracemalloc
from pathlib import Path

import pytest

from aurora.trainer.events import RecordError
from aurora.trainer.identity import code_hash
from aurora.trainer.record import Run, read_folder, read_record
from scripts import verify
from scripts.analysis.foreign import LogError, read_log
from scripts.analysis.report import as_json, markdown_report
from scripts.analysis.verdict import group_runs, was_resumed
from scripts.verification.checks import verify_folder, verify_run
from scripts.verification.export import whole_sources
from scripts.verification.identity import changed_sources
from scripts.verification.replay import replay, restore_sources, run_until
from scripts.verification.reproduction import MARGIN, reproduce
from tests.conftest import OPTIMIZERS, ROOT, train_here

PUBLIC_LOG = (
    "source\n"
    + "=" * 100
    + "\n"
    + "".join(
        f"step:{step}/20 val_loss:{11 / (1 + step):.5f} train_time:{step * 0.1:.3f}s step_avg:100.00ms\n"
        for step in (0, 5, 10, 15, 20, 0, 5, 10, 15, 20)
    )
)


def write(path: Path, record: list[dict]) -> Path:
    path.write_text("".join(json.dumps(event) + "\n" for event in record))
    return path


@pytest.fixture
def muon(trained):
    return copy.deepcopy(trained["muon"])


def of(record, kind):
    return [event for event in record if event["event"] == kind]


def test_honest_runs_are_consistent(trained, tiny_track, tmp_path):
    """Every optimizer, more seeds of one, and all records that are committed: no false alarm."""
    for name in OPTIMIZERS:
        write(tmp_path / f"{name}.jsonl", trained[name])
    for seed in range(1, 5):
        assert train_here(tiny_track, tmp_path, "--optimizer", "muon", "--seed", str(seed)) == 0
    verdicts = verify_folder(tmp_path)
    assert len(verdicts) == 10
    verdicts += verify_folder(ROOT / "results")
    assert [(verdict.path, verdict.reasons) for verdict in verdicts if verdict.word != "consistent"] == []


@pytest.mark.parametrize("steps", [1, 5, 12])
def test_short_runs_whose_loss_still_falls_steeply_are_consistent(tiny_track, tmp_path, steps):
    arguments = ["--optimizer", "aurora", "--set", "optimizer.aurora.lr=0.1", "--set", "optimizer.aurora.embed_lr=0.1"]
    assert train_here(tiny_track, tmp_path, *arguments, "--set", f"train.steps={steps}") == 0
    (verdict,) = verify_folder(tmp_path)
    assert (verdict.word, verdict.reasons) == ("consistent", [])


@pytest.mark.slow
def test_honest_runs_of_own_steps_and_swiglu_are_consistent_and_replay(tiny_track, tmp_path, capsys):
    track = tmp_path / "own.toml"
    track.write_text(tiny_track.read_text().replace("[optimizer.adamw]", "[optimizer.adamw]\nsteps = 15"))
    assert train_here(track, tmp_path, "--optimizer", "adamw", "--set", "model.mlp=swiglu") == 0
    (path,) = tmp_path.glob("*.jsonl")
    record = [json.loads(line) for line in path.read_text().splitlines()]
    assert record[0]["config"]["train"]["steps"] == record[-1]["step"] == 15
    assert record[0]["params_by_role"]["matrix"] == 2 * (4 + 3 * 4) * 32**2
    assert verify.main([str(path), "--replay", "--validations", "99"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 replayed"
    record[0]["config"]["train"]["steps"] = 30
    assert any("15" in reason for reason in verify_run(write(path, record)).reasons)


# Each changes a record in place as a cheat would; what comes after needs more than the record.
def typed_in_loss(r):
    of(r, "val")[2]["val_loss"] = 3.51


def rounded_losses(r):
    for event in of(r, "val"):
        event["val_loss"] = round(event["val_loss"], 5)
    of(r, "end")[0]["val_loss"] = round(of(r, "end")[0]["val_loss"], 5)


def edited_end(r):
    of(r, "end")[0].update(reached_target=True, steps_to_target=7)


def edited_time(r):
    of(r, "val")[-1]["train_time_s"] *= 0.5
    of(r, "end")[0]["train_time_s"] *= 0.5


def all_times_halved(r):
    for event in r:
        if "train_time_s" in event:
            event["train_time_s"] /= 2


def time_runs_back(r):
    of(r, "val")[1]["train_time_s"] = 0.0


def invented_step_times(r):
    for event in of(r, "train"):
        event["step_ms"] = 1000 * of(r, "end")[0]["train_time_s"] / 30


def impossible_speed(r):
    for event in r:
        for key in ("train_time_s", "step_ms", "optimizer_ms"):
            if key in event:
                event[key] /= 1e6


def swapped_config(r):
    r[0]["config"]["hparams"]["lr"] = 0.5


def swapped_hparams(r):
    r[0]["config"]["hparams"]["lr"] = r[0]["hparams"]["lr"] = 0.5


def other_target(r):
    r[0]["config"]["eval"]["target"] = 4.5


def changed_source(r):
    r[0]["sources"]["train_gpt.py"] += "\n"


def changed_seed(r):
    r[0]["seed"] = 7


def other_optimizer(r):
    r[0]["optimizer"] = r[0]["config"]["optimizer"] = "aurora"


def early_stop(r):
    last = of(r, "val")[-1]
    r.remove(last)
    before = of(r, "val")[-1]
    r[:] = [event for event in r if event["event"] != "train" or event["step"] <= before["step"]]
    of(r, "end")[0].update({key: before[key] for key in ("step", "val_loss", "train_time_s")})


def extra_validation(r):
    validations = of(r, "val")
    r.insert(r.index(validations[2]), validations[1] | {"step": 12, "tokens": 12 * 512})


def dropped_validation(r):
    r.remove(of(r, "val")[1])


def other_validation_data(r):
    r[0]["data"]["val_sha256"] = "0" * 64


def longer_schedule(r):
    r[0]["config"]["train"]["steps"] = 60


def run_twice(r):
    r.append(of(r, "end")[0])


def no_train_events(r):
    r[:] = [event for event in r if event["event"] != "train"]


def no_train_event_before_a_validation(r):
    r.remove(of(r, "train")[3])


def faked_resume(r, segment=2):
    stack = {
        key: r[0][key] for key in ("device", "world_size", "env", "micro_batch", "attention", "compiled", "forward")
    }
    r.insert(1, {"event": "resume", "step": 0, "segment": segment} | stack)


def faked_resume_of_a_later_segment(r):
    faked_resume(r, segment=3)
    of(r, "end")[0]["segments"] = 2


def impossible_speed_of_a_faked_resume(r):
    faked_resume(r)
    of(r, "end")[0]["segments"] = 2
    impossible_speed(r)


def hidden_time(r):
    of(r, "end")[0]["untimed"]["warmup_s"] += 10


def no_wall_time(r):
    del of(r, "end")[0]["wall_s"]


def claimed_hparam(name, value):
    def claimed(r):
        r[0]["config"]["hparams"][name] = r[0]["hparams"][name] = value
        r[0]["argv"] += ["--set", f"optimizer.muon.{name}={value}"]

    claimed.__name__ = f"claimed_{name}"
    return claimed


def other_command(r):
    r[0]["argv"] = ["train.py"]


def leaked_validation(r):
    for event in of(r, "train"):
        event["train_loss"] *= 2


FROM_THE_RECORD = {
    typed_in_loss: "step 20: val_loss 3.51 is no sum of float32",
    rounded_losses: "step 0: val_loss 4.15888 is no sum of float32",
    edited_end: "end event: steps_to_target is 7, by the validations 10",
    edited_time: "train_time_s does not rise",
    all_times_halved: "end event: wall_s is",
    time_runs_back: "train_time_s does not rise",
    invented_step_times: "step times repeat",
    impossible_speed: "that its FLOP take at best",
    swapped_config: "hparams are not those of the config",
    swapped_hparams: "the optimizer held lr 0.02 for matrix, lr is 0.5",
    other_target: "eval.target is 4.5, by the embedded track and argv 3.9",
    changed_source: "code_hash is not that of the embedded sources",
    changed_seed: "does not state optimizer, seed 7",
    other_optimizer: "does not state optimizer, seed 0",
    early_stop: "done at step 25, but the config plans 30 steps",
    extra_validation: "validated at steps that the config does not declare: [12]",
    dropped_validation: "not validated at declared steps: [10]",
    other_validation_data: "stream_id is not that of its shards and validation tokens",
    longer_schedule: "train.steps is 60, by the embedded track and argv 30",
    run_twice: "an end event is followed by a end event",
    no_train_events: "no train event at steps where one is due: [5, 10, 15, 20, 25]",
    no_train_event_before_a_validation: "no train event at steps where one is due: [20]",
    faked_resume: "end event: 1 segments, the resumed ones are [2]",
    faked_resume_of_a_later_segment: "end event: 2 segments, the resumed ones are [3]",
    impossible_speed_of_a_faked_resume: "that its FLOP take at best",
    hidden_time: "end event: wall_s is",
    no_wall_time: "end event lacks wall_s",
    claimed_hparam("momentum", 0.5): "the optimizer held momentum 0.95 for matrix, momentum is 0.5",
    claimed_hparam("embed_lr", 0.5): "the optimizer held lr 0.003 for embed, embed_lr is 0.5",
    other_command: "is no command line of train_gpt.py",
    leaked_validation: "is too far below train_loss",
}


@pytest.mark.parametrize("tamper", FROM_THE_RECORD, ids=lambda tamper: tamper.__name__)
def test_tampering_shows_in_the_record(tamper, muon, tmp_path):
    tamper(muon)
    reasons = verify_run(write(tmp_path / "a.jsonl", muon)).reasons
    assert any(FROM_THE_RECORD[tamper] in reason for reason in reasons), reasons


def test_a_run_that_learns_its_training_text_by_heart_is_consistent(muon, tmp_path):
    for event in of(muon, "train"):
        event["train_loss"] = 0.02
    assert verify_run(write(tmp_path / "a.jsonl", muon)).reasons == []


def test_a_run_on_an_apple_gpu_is_consistent(muon, tmp_path):
    muon[0]["device"] = "mps"
    assert verify_run(write(tmp_path / "a.jsonl", muon)).reasons == []


# Segments of a run of twelve steps, with validations at 0, 4, 8 and 12 and checkpoints every 3: ranks and faults,
# then the validations that count.
SEGMENTS = {
    "killed, resumed": ([(1, "kill:fetch:5"), (1, "")], [0, 4, 8, 12]),
    "killed, resumed by other ranks": ([(1, "kill:fetch:5"), (2, "")], [0, 4, 8, 12]),
    "resumed twice from one checkpoint": ([(1, "kill:fetch:5"), (1, "kill:fetch:5"), (1, "")], [0, 4, 8, 12]),
    "stopped, resumed, killed, resumed": (
        [(2, "term:fetch:4"), (1, "kill:fetch:8"), (2, "")],
        [0, 4, 8, 12],
    ),
    "killed when all was saved, resumed": ([(1, "kill:end:12"), (1, "")], [0, 4, 8, 12]),
    "killed before a validation, resumed": ([(2, "kill:validate_batch:8"), (2, "")], [0, 4, 8, 12]),
    "stopped": ([(1, "term:fetch:4")], [0, 4]),
    "stopped, resumed, killed": ([(1, "term:fetch:4"), (1, "kill:fetch:10")], [0, 4, 8]),
    "killed, resumed, killed before the same validation": ([(1, "kill:fetch:8"), (1, "kill:fetch:7")], [0, 4]),
    "diverged": ([(1, "nan:gradient:6")], [0, 4]),
}


OFTEN = "stopped, resumed, killed, resumed", "killed, resumed, killed before the same validation", "stopped", "diverged"
CASES = [
    pytest.param(*case, marks=[] if name in OFTEN else pytest.mark.slow, id=name) for name, case in SEGMENTS.items()
]


@pytest.mark.parametrize("segments,validations", CASES)
def test_resumed_and_broken_off_runs_are_consistent(twelve_steps, launch, tmp_path, segments, validations):
    for number, (world_size, fault) in enumerate(segments):
        resume = ["--resume"] if number else []
        outcome = launch(*twelve_steps, "--out", tmp_path, *resume, world_size=world_size, fault=fault)
        assert bool(fault) == any(outcome.codes), outcome.err
    (path,) = tmp_path.glob("*.jsonl")
    assert verify_run(path).reasons == []
    run = read_record(path)
    assert [validation.step for validation in run.validations] == validations
    assert was_resumed(run) == bool(run.resumes) == (len(segments) > 1)


def test_a_loss_that_a_resume_by_the_same_ranks_does_not_repeat_is_refuted(muon, tmp_path):
    """By other ranks it need only come close, since they add in another order."""
    faked_resume(muon)
    resume = muon.pop(1) | {"step": 10}
    of(muon, "end")[0]["segments"] = 2
    undone, at = dict(of(muon, "val")[2]), muon.index(of(muon, "neurons")[0]) + 1
    muon[at:at] = [undone, resume]

    def reasons(difference, world_size):
        undone["val_loss"] = of(muon, "val")[3]["val_loss"] + difference
        resume["world_size"] = world_size
        return verify_run(write(tmp_path / "a.jsonl", muon)).reasons

    grain = 2.0**-9 / 512
    assert reasons(0, 1) == reasons(grain, 2) == []
    assert "step 20 was run twice" in reasons(grain, 1)[0]
    assert "step 20 was run twice" in reasons(10_000 * grain, 2)[0]


def test_dropped_seed_and_duplicated_run_show_in_the_folder(tiny_track, trained, tmp_path):
    for seed in (0, 2):
        out = tmp_path / str(seed)
        train_here(tiny_track, out, "--optimizer", "muon", "--seed", str(seed), "--set", "train.steps=5")
    found = verify_folder(tmp_path)
    assert [verification.word for verification in found] == ["gaps"] * 2
    assert all("lacks [1]" in verification.notes[-1] for verification in found)  # notes before: the checkout was edited
    (tmp_path / "2").rename(tmp_path / "a_tuning")  # which has seeds of its own
    assert [verification.word for verification in verify_folder(tmp_path)] == ["consistent"] * 2
    assert verify.main([str(tmp_path)]) == 0
    copies = tmp_path / "copies"
    copies.mkdir()
    for name in "ab":
        write(copies / f"{name}.jsonl", trained["muon"])
    assert [verdict.word for verdict in verify_folder(copies)] == ["consistent", "refuted"]


def test_a_first_window_in_which_losses_rose_says_nothing_of_the_validation_behind_it(muon, tmp_path):
    """As with a learning rate far too high, from which a run may come back."""
    start, untrained, validation = muon[0], *of(muon, "val")[:2]
    window = next(event for event in of(muon, "train") if event["step"] == validation["step"]) | {"train_loss": 6.6}
    reasons = verify_run(write(tmp_path / "a.jsonl", [start, untrained, window, validation])).reasons
    assert not any("too far below" in reason for reason in reasons)


def test_replay_catches_what_the_record_hides(muon, tmp_path, capsys, monkeypatch):
    """Losses of another run, at which every sum agrees, are invented too well for the record alone."""
    replayed = []

    def run_once(*args, real=run_until):
        """Of both records code, config and seed are the same, and so is what a replay finds."""
        if not replayed:
            replayed.append(real(*args))
        return replayed[0]

    monkeypatch.setattr("scripts.verification.replay.run_until", run_once)
    honest = write(tmp_path / "honest.jsonl", muon)
    assert verify.main([str(honest), "--replay", "--validations", "2"]) == 0
    assert "replayed to step 10 of 30" in capsys.readouterr().out
    step = 2.0**-9 / 512  # keeps it a sum of float32 over the 512 tokens
    validation = of(muon, "val")[1]
    validation["val_loss"] = (round(validation["val_loss"] / step) - 20) * step
    forged = write(tmp_path / "forged.jsonl", muon)
    assert verify_run(forged).word == "consistent"
    assert verify.main([str(forged), "--replay", "--validations", "2"]) == 1
    assert "replay: val_loss" in capsys.readouterr().out


def test_the_verdict_of_a_replay_says_how_far_and_how_near(muon, tmp_path, monkeypatch):
    muon[0]["env"]["cpu"] = "another"
    path = write(tmp_path / "a.jsonl", muon)
    run = read_record(path)

    def replayed(num_validations, num_found, rounding=0.01, **changes):
        here = run.start | {"env": run.start["env"] | {"cpu": "this one"}} | changes
        found = [
            validation._replace(val_loss=validation.val_loss + rounding) for validation in run.validations[:num_found]
        ]
        monkeypatch.setattr("scripts.verification.replay.run_until", lambda *args: (found, here, "killed"))
        return replay(verify_run(path), num_validations)

    assert replayed(5, 5).word == "replayed within 0.02 on another stack"
    assert replayed(2, 2).word == "replayed to step 10 of 30 within 0.02 on another stack"
    assert replayed(5, 5, rounding=0).word == "replayed"
    assert replayed(5, 5, rounding=0.03).word == "refuted"
    same_cpu = {"env": run.start["env"]}
    assert replayed(5, 5, **same_cpu).word == "refuted", "on this very stack it gave other bits"
    assert replayed(5, 5, **same_cpu, param_groups=[]).word == "replayed within 0.02 on another stack"
    run.start["env"].pop("cpu_model")
    assert "cpu_model" not in same_cpu["env"] and write(path, [run.start, *muon[1:]])
    assert replayed(5, 5, **same_cpu).word == "replayed within 0.02 on another stack", "its processor is not known"
    run.start["env"] |= {"cpu_model": "any"}
    stopped = replayed(2, 1)
    assert stopped.word == "consistent" and "after 1 of 2 validations: killed" in stopped.notes[-1]


OLD = "results/quick_grids_tuning"


@pytest.mark.parametrize(
    "name, added",
    [
        (f"{OLD}/aurora_folded-lr0.015-aux0.003", {"results/momentum.py", "results/tracking.py"}),
        (f"{OLD}/adamw-lr0.0005-aux0.003", set()),
        ("results/quick/comparison/quick-adamw-s0-20261125T215936-0f94", set()),
    ],
)
def test_a_replay_has_every_module_that_the_sources_import(name, added):
    run = read_record(ROOT / f"{name}.jsonl")
    sources = whole_sources(run)
    assert sources.keys() - run.start["sources"].keys() == added
    for text in sources.values():
        for module in re.findall(r"^from ((?:aurora|configs|data|results)(?:\.\w+)*) import", text, re.MULTILINE):
            path = module.replace(".", "/")
            assert f"{path}.py" in sources or f"{path}/__init__.py" in sources or module == "aurora.runtime", module


def test_sources_that_are_not_those_of_their_commit_are_noted():
    def git(*args):
        return subprocess.run(["git", "-C", ROOT, *args], capture_output=True, text=True, check=True).stdout

    try:
        commit = git("rev-parse", "HEAD").strip()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no git here")
    sources = {"aurora/tokens/manifest.py": git("show", f"{commit}:aurora/tokens/manifest.py"), "own.toml": ""}
    start = {"git": {"commit": commit}, "sources": sources}
    assert changed_sources(start) == []
    assert changed_sources(start | {"sources": sources | {"aurora/tokens/manifest.py": "", "new.py": ""}}) == [
        "aurora/tokens/manifest.py",
        "new.py",
    ]
    for unknown in ({"commit": "0" * 40}, {"commit": "--help"}, {}, None):
        assert changed_sources(start | {"git": unknown, "sources": {"new.py": ""}}) == []


def test_usage_errors_say_what_is_wrong(muon, tmp_path, capsys):
    path = str(write(tmp_path / "a.jsonl", muon))
    (tmp_path / "README.md").write_text("# Title\n")
    for arguments, message in (
        ([path, "--against", "nope"], "no such folder: nope"),
        ([str(tmp_path / "README.md")], "README.md is not a record"),
        ([path, "--replay", "--validations", "0"], "--validations must be at least 1, got 0"),
    ):
        with pytest.raises(SystemExit) as error:
            verify.main(arguments)
        assert error.value.code == 2 and message in capsys.readouterr().err


def test_a_folder_is_read_while_checkpoints_come_and_go(muon, tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", muon)
    for name in ("a.checkpoints", "vanishes"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "b.jsonl", muon)
    scandir = os.scandir

    def vanishing(folder):
        return scandir(f"{folder}, which is gone" if str(folder).endswith("vanishes") else folder)

    monkeypatch.setattr(os, "scandir", vanishing)
    assert [run.path for run in read_folder(tmp_path)[0]] == [path]


def test_anything_gets_a_verdict(muon, tmp_path):
    """1,000 broken records and logs: none raises, what can be read is reported, and memory of the last stays small."""
    rng = random.Random(0)
    muon[0]["sources"] = {"train_gpt.py": "x = 1\n", "tiny.toml": ""}
    muon[0]["code_hash"] = code_hash(muon[0]["sources"])
    originals = ["".join(json.dumps(event) + "\n" for event in muon).encode(), PUBLIC_LOG.encode()]
    path = tmp_path / "broken"
    for i in range(1000):
        if i == 800:
            tracemalloc.start()  # which slows all down
        path.write_bytes(mutated(originals[i % 2], rng))
        assert verify_run(path).word in ("consistent", "incomplete", "refuted")
        runs = []
        with contextlib.suppress(RecordError):
            runs.append(read_record(path))
        for groups in group_runs(runs[: i % 10 == 0]).values():  # of every tenth, it is slow
            assert markdown_report(groups) and json.dumps(as_json(groups), allow_nan=False)
        try:
            assert all(trial.status in ("complete", "torn", "diverged", "open") for trial in read_log(path))
        except LogError as error:
            assert str(path) in str(error)
    assert tracemalloc.get_traced_memory()[1] < 100 * 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("value", [[0] * 1000, "x" * 1000, None, True, 10**30, {}])
@pytest.mark.parametrize("path", ["params_by_role.matrix", "config.train.batch_tokens", "env.cpu_count"])
def test_what_is_no_number_is_not_multiplied(path, value, muon, tmp_path):
    """A list times a number of FLOP would fill the memory."""
    table, (*tables, key) = muon[0], path.split(".")
    for name in tables:
        table = table[name]
    table[key] = value
    tracemalloc.start()
    assert f"{path} is no number" in verify_run(write(tmp_path / "a.jsonl", muon)).reasons[0]
    assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    tracemalloc.stop()


def mutated(content: bytes, rng: random.Random) -> bytes:
    lines = content.splitlines(keepends=True)
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    at, kind = rng.randrange(len(content)), rng.randrange(14)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]
    if kind == 2:
        lines.insert(i, lines[j])
    elif kind == 3:
        lines[i], lines[j] = lines[j], lines[i]
    elif kind in (4, 5):
        new = rng.choice(
            [b"NaN", b"1e999", b"-0", b"1" + b"0" * 400, b"1" * 5000, b"-1", b"null", b'"x"', b"[]", b"{}"]
        )
        digits = [k for k in range(len(content)) if content[k : k + 1].isdigit()]
        k = rng.choice(digits)
        return content[:k] + new + content[k + 1 :]
    elif kind == 6:
        return content.replace(rng.choice([b'"step"', b'"config"', b'"eval"', b'"env"', b'"status"', b"step:"]), b'"y"')
    elif kind == 7:
        return content.replace(b"\n", b"\r\n")
    elif kind == 8:
        return b"\xef\xbb\xbf" + content
    elif kind == 9:
        return content[:at] + b"\xff\xfe\x80" + content[at:]
    elif kind == 10:
        lines.insert(i, b"x" * 2**20 + b"\n")
    elif kind == 11:
        lines.insert(i, b'{"event":' + b"[" * 100_000 + b"\n")
    elif kind == 12:
        del lines[i]
    else:
        value = rng.choice([b"null", b"[]", b"{}", b'"x"', b"1e308", b"-5", b"true"])
        key = rng.choice([b'"config": ', b'"data": ', b'"sources": ', b'"seed": ', b'"step": ', b'"untimed": '])
        return content.replace(key, key + value + b', "z": ', 1)
    return b"".join(lines)


@pytest.mark.parametrize(
    "name", ["../evil.py", "/tmp/evil.py", "a/../../evil.py", "C:\\evil.py", "..\\evil.py", "a\0b"]
)
def test_sources_stay_below_their_folder(name, muon, tmp_path):
    muon[0]["sources"][name] = "print('evil')"
    muon[0]["code_hash"] = code_hash(muon[0]["sources"])
    assert "lead out" in verify_run(write(tmp_path / "a.jsonl", muon)).reasons[0]
    inside = tmp_path / "inside"
    inside.mkdir()
    with pytest.raises(RecordError, match="cannot be restored"):
        restore_sources(muon[0]["sources"], inside)
    assert not list(inside.iterdir()) and not (tmp_path / "evil.py").exists()


def test_sources_and_commits_of_any_type_get_a_verdict(muon, tmp_path):
    muon[0]["git"] = ["commit"]
    assert verify_run(write(tmp_path / "a.jsonl", muon)).word == "consistent"
    muon[0]["sources"]["data.txt"] = 5
    assert "sources that are no text: ['data.txt']" in verify_run(write(tmp_path / "a.jsonl", muon)).reasons


def test_links_and_large_files_are_refused(muon, tmp_path):
    (tmp_path / "link.jsonl").symlink_to(write(tmp_path / "a.jsonl", muon))
    assert "links" in verify_run(tmp_path / "link.jsonl").reasons[0]
    with open(tmp_path / "large.jsonl", "wb") as file:
        file.truncate(2**30)
    assert "larger" in verify_run(tmp_path / "large.jsonl").reasons[0]


def test_records_that_would_fill_memory_or_take_hours_are_refused(muon, tmp_path):
    path = write(tmp_path / "a.jsonl", muon)
    path.write_text(path.read_text() + '{"event": "x", "y": [' + "[]," * 300_000 + "0]}\n")
    assert "more than 200,000 tables and lists" in verify_run(path).reasons[0]
    keys = [*range(200_000), 199_999]
    path.write_text('{"event": "run", ' + ", ".join(f'"{key}": 0' for key in keys) + "}\n")
    begin_s = time.monotonic()
    assert "has the key '199999' more than once" in verify_run(path).reasons[0]
    assert time.monotonic() - begin_s < 10


def test_terminal_escapes_are_not_printed(muon, tmp_path, capsys):
    muon[0]["run_id"] = "\x1b[2J\x1b]0;evil\x07\u202e"
    path = write(tmp_path / "a\x1b[31m.jsonl", muon)
    assert verify.main([str(path)]) == 1
    output = capsys.readouterr().out
    assert "refuted" in output and "evil" in output
    assert not any(c in output for c in "\x1b\x07\u202e")


def runs_of(first_seed, losses):
    start = {"task_hash": "t", "hparams": {"lr": 1}, "config": {"train": {"steps": 9}}}
    return [
        Run(Path(), start | {"seed": first_seed + i}, end={"status": "done", "val_loss": loss})
        for i, loss in enumerate(losses)
    ]


def test_seeds_of_ones_own_reproduce_or_contradict():
    claimed = runs_of(0, [3.0, 3.001, 2.999])
    assert reproduce(claimed, runs_of(10, [3.0005, 3.0, 2.9985]))[0] == "reproduced"
    assert reproduce(claimed, runs_of(10, [2.5, 2.51, 2.52]))[0] == "reproduced", "better than claimed"
    assert reproduce(claimed, runs_of(10, [3.02, 3.0, 2.98]))[0] == "not contradicted", "too wide a spread to tell"
    word, reason = reproduce(claimed, runs_of(10, [3.2, 3.21, 3.22]))
    assert word == "contradicted" and "Welch p = " in reason
    assert reproduce(runs_of(0, [3.0] * 3), runs_of(10, [3.0] * 3))[0] == "not comparable", "no spread, no test"
    assert "both sides" in reproduce(claimed, claimed)[1]
    assert "3 finished runs" in reproduce(claimed, runs_of(10, [3.0, 3.1]))[1]
    other = runs_of(10, [3.0, 3.1, 3.2])
    other[0].start["hparams"] = {"lr": 2}
    assert reproduce(claimed, other)[0] == "not comparable"


@pytest.mark.parametrize("sd", [0.0013, 0.0057])
def test_a_claim_that_exaggerates_by_the_margin_is_seldom_reproduced(sd):
    rng = random.Random(0)

    def word(exaggeration):
        claimed, own = ([rng.gauss(mean, sd) for _ in range(3)] for mean in (3.0, 3.0 + exaggeration))
        return reproduce(runs_of(0, claimed), runs_of(10, own))[0]

    assert sum(word(MARGIN) == "reproduced" for _ in range(300)) <= 15  # 2.5 % are expected
    honest = sum(word(0.0) == "reproduced" for _ in range(100))
    assert honest > 80 if sd == 0.0013 else honest < 20
