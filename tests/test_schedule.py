"""Schedules: their values against formulas of their own, in whole runs, over a resume, and those of public rows."""

import copy
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from torch.optim.optimizer import register_optimizer_step_pre_hook

import train_gpt
from aurora.config import load_config, parse_config, recorded
from aurora.errors import Exit, HarnessError
from aurora.schedule import check_spans, checked_pieces, value_at
from aurora.trainer.checkpoint import list_checkpoints
from scripts import verify
from scripts.verification.checks import verify_run
from scripts.verification.replay import settings_of
from tests.conftest import TINY_TRACK, events, losses, make_run, often, tiny_table, train_here

STEPS = 20


def track(schedule: str, own: str = "", folder: str = "", steps: int = 30, optimizer: str = "muon") -> str:
    """The tiny track with another [schedule]; own: of the optimizer's table [optimizer.NAME.schedule]."""
    text = TINY_TRACK.format(folder=folder).partition("[schedule]")[0].replace("steps = 30", f"steps = {steps}")
    own = f"[optimizer.{optimizer}.schedule]\n{own}\n" if own else ""
    return f"{text}[schedule]\n{schedule}\n{tiny_table(optimizer)}\n{own}"


def parsed(schedule: str, own: str = "", steps: int = 30, optimizer: str = "muon", overrides=()):
    return parse_config(track(schedule, own, "", steps, optimizer), Path("tiny.toml"), optimizer, overrides)


def values(config, role="matrix", **group):
    """What a group holds in every step, by key."""
    group = {"role": role, "peak_lr": 1.0} | group
    found = [train_gpt.scheduled(step, group, config) for step in range(config.train.steps)]
    return {key: [settings[key] for settings in found] for key in found[0]}


# Pieces, and what they mean: a function of the progress p in [0, 1) of 20 steps.
ORACLES = {
    "flat": ([{"until": 1.0}], lambda p: 1.0),
    "linear warm-up": ([{"until": 5, "from": 0.0}], lambda p: min(1.0, 4 * p)),
    "warm-up, flat, linear": (
        [{"until": 5, "from": 0.2}, {"until": 0.6}, {"until": 1.0, "to": 0.1}],
        lambda p: np.interp(p, [0, 0.25, 0.6, 1], [0.2, 1, 1, 0.1]),
    ),
    "cosine": ([{"until": 1.0, "to": 0.0, "shape": "cosine"}], lambda p: 0.5 + 0.5 * math.cos(math.pi * p)),
    "cosine to a floor": (
        [{"until": 0.5}, {"until": 1.0, "to": 0.3, "shape": "cosine"}],
        lambda p: 1.0 if p < 0.5 else 0.3 + 0.7 * (1 + math.cos(2 * math.pi * (p - 0.5))) / 2,
    ),
    "rising cosine": (
        [{"until": 10, "from": 0.1, "shape": "cosine"}],
        lambda p: 0.55 - 0.45 * math.cos(2 * math.pi * p) if p < 0.5 else 1.0,
    ),
    "1 - sqrt": ([{"until": 1.0, "to": 0.0, "shape": "sqrt"}], lambda p: 1 - p**0.5),
    "1 - sqrt from the middle": (
        [{"until": 8}, {"until": 1.0, "to": 0.05, "shape": "sqrt"}],
        lambda p: 1.0 if p < 0.4 else 1 - 0.95 * math.sqrt((p - 0.4) / 0.6),
    ),
    "power": ([{"until": 1.0, "to": 0.0, "shape": "power", "exponent": 1.2}], lambda p: (1 - p) ** 1.2),
    "power with a floor": (
        [{"until": 0.3}, {"until": 1.0, "to": 0.04, "shape": "power", "exponent": 3}],
        lambda p: 1.0 if p < 0.3 else 0.04 + 0.96 * ((1 - p) / 0.7) ** 3,
    ),
    "piecewise constant": (
        [{"until": 0.25}, {"until": 10, "from": 0.5, "to": 0.5}, {"until": 0.75}, {"until": 1.0, "from": 0, "to": 0}],
        lambda p: [1.0, 0.5, 0.5, 0.0][int(4 * p)],
    ),
    "ends between two steps": (
        [{"until": 0.33, "from": 0.0}, {"until": 0.77, "to": 0.4}],
        lambda p: np.interp(p, [0, 0.33, 0.77], [0, 1, 0.4]),
    ),
    "up and down": (
        [{"until": 4, "from": 0.5}, {"until": 8, "to": 0.2}, {"until": 12, "to": 0.8}, {"until": 16, "to": 0.0}],
        lambda p: np.interp(p, [0, 0.2, 0.4, 0.6, 0.8], [0.5, 1, 0.2, 0.8, 0]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ORACLES)
def test_every_shape_is_its_formula(name):
    pieces, oracle = ORACLES[name]
    pieces = checked_pieces(pieces, "lr", "schedule.lr")
    check_spans(pieces, STEPS, "schedule.lr")
    found = [value_at(step, pieces, STEPS, 1.0) for step in range(STEPS)]
    np.testing.assert_allclose(found, [oracle(step / STEPS) for step in range(STEPS)], rtol=1e-13, atol=1e-15)


def test_the_short_form_is_bit_for_bit_what_it_was():
    config = parsed("cooldown_frac = 0.7\nfinal_lr_frac = 0.05", steps=97, overrides=["optimizer.muon.warmup_steps=7"])
    for step, lr in enumerate(values(config, peak_lr=0.025)["lr"]):
        remaining = 1 - step / 97
        scale = 1.0 if remaining >= 0.7 else 0.05 + (1 - 0.05) * remaining / 0.7
        assert lr == 0.025 * (scale * min(1.0, (step + 1) / 7))
    assert recorded(config)["schedule"] == {"cooldown_frac": 0.7, "final_lr_frac": 0.05}


def test_an_optimizers_own_schedule_comes_first_and_a_roles_before_all():
    falling, flat = "[{until = 1.0, to = 0.0}]", "[{until = 1.0}]"
    common = f"lr = {falling}\nweight_decay = {falling}\n[schedule.embed]\nlr = {flat}"
    config = parsed(common)
    assert values(config, "embed")["lr"][15] == 1.0 and values(config, "head")["lr"][15] == 0.5
    config = parsed(common, f"lr = {flat}")
    assert {values(config, role)["lr"][15] for role in ("embed", "head")} == {1.0}
    assert values(config, "head", peak_weight_decay=0.2)["weight_decay"][15] == 0.1
    config = parsed(common, f"head = {{lr = {flat}}}\nplanned_steps = 60")
    assert [values(config, role)["lr"][15] for role in ("embed", "head", "matrix")] == [1.0, 1.0, 0.75]
    config = parsed("cooldown_frac = 0.5\nfinal_lr_frac = 0.0", f"embed = {{lr = {falling}}}")
    assert [values(config, role)["lr"][9] for role in ("embed", "head")] == [pytest.approx(0.7), 1.0]
    config = parsed("cooldown_frac = 0.5\nfinal_lr_frac = 0.0", f"lr = {falling}")
    assert recorded(config)["schedule"] == {"lr": [{"until": 1.0, "to": 0.0}]}


def test_the_settings_of_a_replay_give_the_same_schedule():
    short = "cooldown_frac = 0.5\nfinal_lr_frac = 0.0"
    for schedule, own in ((SCHEDULE, OWN), (short, "lr = [{until = 1.0, to = 0.0}]"), (short, OWN), (short, "")):
        config = parsed(schedule, own)
        words = settings_of({"config": json.loads(json.dumps(recorded(config))), "optimizer": "muon"})
        overrides = [word for word in words[1::2] if not word.startswith("data.")]
        assert recorded(parsed(schedule, own, overrides=overrides)) == recorded(config)


# ---- whole runs ----

SCHEDULE = """
planned_steps = 36
lr = [{until = 4, from = 0.25}, {until = 0.5}, {until = 1.0, to = 0.1, shape = "cosine"}]
weight_decay = [{until = 1.0, to = 0.2, shape = "sqrt"}]
[schedule.embed]
lr = [{until = 0.25}, {until = 1.0, to = 0.0, shape = "power", exponent = 1.5}]
"""
OWN = "momentum = [{until = 10, from = 0.85}, {until = 20}, {until = 1.0, to = 0.8}]"
PEAKS = {"matrix": 0.02, "embed": 0.003, "head": 0.003, "vector": 0.003}


def oracle(step):
    """What the schedule above sets in a step, by role and key; tests/conftest.py has the tables' values."""
    p = step / 36
    share = np.interp(step, [0, 4], [0.25, 1]) if p < 0.5 else 0.1 + 0.9 * (1 + math.cos(2 * math.pi * (p - 0.5))) / 2
    decay = 0.2 + 0.8 * (1 - math.sqrt(p))
    found = {f"{role}.lr": peak * share for role, peak in PEAKS.items()}
    found |= {f"{role}.weight_decay": (0.01 if role == "matrix" else 0.0) * decay for role in PEAKS}
    found["embed.lr"] = 0.003 if p < 0.25 else 0.003 * ((1 - p) / 0.75) ** 1.5
    found["matrix.momentum"] = np.interp(step, [0, 10, 20, 36], [0.85, 0.95, 0.95, 0.8])
    return found


@pytest.fixture(scope="session")
def scheduled_track(tiny_track):
    path = tiny_track.with_name("scheduled.toml")
    text = track(SCHEDULE, OWN, tiny_track.parent).replace("log_every = 5", "log_every = 1")
    path.write_text(text.replace("checkpoint_every = 0", "checkpoint_every = 20"))
    return path


@pytest.fixture(scope="session")
def scheduled_run(scheduled_track, tmp_path_factory):
    """The folder of a run with a schedule for everything, and what its groups held in the update of each step."""
    out, held = tmp_path_factory.mktemp("scheduled"), []

    def hook(optimizer, args, kwargs):
        held.append({f"{group['role']}.{key}": group[key] for group in optimizer.param_groups for key in group
                     if key in ("lr", "weight_decay") or (key, group["role"]) == ("momentum", "matrix")})  # fmt: skip

    handle = register_optimizer_step_pre_hook(hook)
    try:
        assert train_here(scheduled_track, out, "--optimizer", "muon") == 0
    finally:
        handle.remove()
    return out, held[-30:]  # before them is the warm-up


def test_a_run_holds_the_schedule_in_every_step_and_records_it(scheduled_run):
    out, held = scheduled_run
    for step in range(30):
        expected = oracle(step)
        assert held[step].keys() == expected.keys()
        assert held[step] == pytest.approx(expected, rel=1e-12)
    trains = [event for event in events(out) if event["event"] == "train"]
    assert [event["step"] for event in trains] == list(range(1, 31))
    for event, settings in zip(trains, held, strict=True):
        assert {"matrix.lr": event["lr"]} | event["scheduled"] == settings
    assert events(out)[-1]["step"] == 30
    (path,) = out.glob("*.jsonl")
    assert verify_run(path).reasons == []


def test_a_resumed_run_goes_on_bit_for_bit(scheduled_run, scheduled_track, tmp_path):
    out, _ = scheduled_run
    again = tmp_path / "again"
    shutil.copytree(out, again)
    (record,) = again.glob("*.jsonl")
    record.write_text("".join(record.read_text().splitlines(keepends=True)[:-1]))
    shutil.rmtree(list_checkpoints(next(again.glob("*.checkpoints")))[-1])  # of step 30
    assert train_here(scheduled_track, again, "--optimizer", "muon", "--resume") == 0
    (resume,) = [event for event in events(again) if event["event"] == "resume"]
    first, second = events(out), events(again)
    assert resume["step"] == 20 and first[-1]["weights_sha256"] == second[-1]["weights_sha256"]
    assert losses(again)[-2:] == losses(out)[-2:]
    assert verify_run(record).reasons == []


@pytest.mark.parametrize("optimizer", ["adamw", often("aurora", False)])
def test_other_optimizers_follow_their_schedules(scheduled_track, tmp_path, optimizer):
    text = track(SCHEDULE, "" if optimizer == "adamw" else OWN, scheduled_track.parent, 10, optimizer)
    path = tmp_path / "tiny.toml"
    path.write_text(text)
    assert train_here(path, tmp_path / "out", "--optimizer", optimizer) == 0
    (record,) = (tmp_path / "out").glob("*.jsonl")
    assert verify_run(record).reasons == []
    last = [event for event in events(tmp_path / "out") if event["event"] == "train"][-1]["scheduled"]
    assert last["embed.lr"] == pytest.approx(oracle(9)["embed.lr"], rel=1e-12)
    assert ("matrix.momentum" in last) == (optimizer == "aurora")


def test_a_flat_schedule_of_pieces_trains_as_the_short_form(tiny_track, tmp_path):
    """To the last bit, decay and momentum included: pieces that hold the table's values change nothing."""
    short, pieces = tmp_path / "short.toml", tmp_path / "pieces.toml"
    short.write_text(track("cooldown_frac = 0.0\nfinal_lr_frac = 0.0", "", tiny_track.parent, 3))
    flat = "[{until = 1.0}]"
    pieces.write_text(track(f"lr = {flat}\nweight_decay = {flat}\nmomentum = {flat}", "", tiny_track.parent, 3))
    found = []
    for path in (short, pieces):
        assert train_here(path, tmp_path / path.stem, "--optimizer", "muon") == 0
        found.append(events(tmp_path / path.stem))
    assert found[0][-1]["weights_sha256"] == found[1][-1]["weights_sha256"]
    assert found[0][0]["task_hash"] == found[1][0]["task_hash"]


def test_planned_to_3300_and_stopped_at_3250():
    schedule = "planned_steps = 3300\nlr = [{until = 0.3}, {until = 1.0, to = 0.0}]"
    config, short = parsed(schedule, steps=3250), "cooldown_frac = 0.7\nfinal_lr_frac = 0.0\nplanned_steps = 3300"
    for planned in (config, parsed(short, steps=3250)):
        lrs = values(planned)["lr"]
        assert len(lrs) == 3250 and lrs[989] == lrs[990] == 1.0
        assert lrs[3249] == pytest.approx(51 / 2310, rel=1e-12)
    assert max(train_gpt.validation_steps(config)) == config.train.steps == 3250


def test_a_dry_run_says_what_is_scheduled(scheduled_track, tmp_path, capsys):
    assert train_here(scheduled_track, tmp_path, "--optimizer", "muon", "--dry-run") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("schedule")]
    assert lines == [
        "schedule: planned for 36 steps, the run ends at step 30",
        "schedule of lr (matrix, head, vector): 0.25 to 1 (linear) until step 4, 1 until step 18, 1 to 0.1 (cosine) "
        "until step 36",
        "schedule of lr (embed): 1 until step 9, 1 to 0 (power 1.5) until step 36",
        "schedule of weight_decay: 1 to 0.2 (sqrt) until step 36",
        "schedule of momentum (matrix): 0.85 to 0.95 (linear) until step 10, 0.95 until step 20, 0.95 to 0.8 (linear) "
        "until step 36",
    ]


def test_what_an_optimizers_own_schedule_supersedes_is_said(tiny_track, tmp_path, capsys):
    own = "optimizer.muon.schedule={lr = [{until = 1.0}]}"
    arguments = ["--optimizer", "muon", "--dry-run", "--set", "schedule.cooldown_frac=0.5"]
    assert train_here(tiny_track, tmp_path, *arguments) == 0
    assert "changes nothing" not in capsys.readouterr().out
    assert train_here(tiny_track, tmp_path, *arguments, "--set", own) == 0
    assert "--set schedule.cooldown_frac=0.5 changes nothing for muon\n" in capsys.readouterr().out


@pytest.mark.slow
def test_a_scheduled_run_replays(scheduled_run, capsys):
    (path,) = scheduled_run[0].glob("*.jsonl")
    assert verify.main([str(path), "--replay", "--validations", "99"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 replayed"


# ---- what is refused ----

SHORT = "cooldown_frac = 0.4\nfinal_lr_frac = 0.0\n"
REFUSED = [
    (SHORT + "lr = 0.5", "schedule.lr must be a list as [{until = 0.6}, {until = 1.0, to = 0.0}], got 0.5"),
    ("lr = []", "schedule.lr must have 1 to 64 pieces, got 0"),
    (f"lr = [{', '.join(f'{{until = {n}}}' for n in range(1, 66))}]", "must have 1 to 64 pieces, got 65"),
    ("lr = [1.0]", "schedule.lr must be a list as"),
    ("lr = [{to = 0.0}]", "schedule.lr piece 1 lacks until: a step, or a float"),
    ("lr = [{until = 1.0, too = 0.0}]", "schedule.lr piece 1 has an unknown key 'too', did you mean 'to'?"),
    ("lr = [{until = 0}]", "schedule.lr piece 1: until must be a whole number of steps from 1 to 1000000, or"),
    ("lr = [{until = 1.5}]", "piece 1: until must be"),
    (f"lr = [{{until = {10**400}}}]", "until must be a whole number of steps from 1 to 1000000, or a float in (0, 1]"),
    ("lr = [{until = true}]", "piece 1: until must be"),
    ("lr = [{until = nan}]", "piece 1: until must be"),
    ("lr = [{until = 31}]", "schedule.lr piece 1: until = 31 is beyond the 30 steps that are planned; lower it"),
    ("lr = [{until = 0.5}, {until = 15}]", "piece 2: until = 15 is step 15, not after step 15, where the piece before"),
    ("lr = [{until = 1.0, from = 1.5}]", "piece 1: from must be in [0, 1]: a share of the value in the optimizer's"),
    ("lr = [{until = 1.0, to = inf}]", "piece 1: to must be in [0, 1]"),
    ("lr = [{until = 1.0, to = -0.1}]", "piece 1: to must be in [0, 1]"),
    ("lr = [{until = 1.0, to = false}]", "piece 1: to must be in [0, 1]"),
    ("lr = [{until = 1.0, shape = 'cosin'}]", "piece 1: shape must be linear, cosine, sqrt or power, got 'cosin'"),
    ("lr = [{until = 1.0, shape = ['sqrt']}]", "piece 1: shape must be linear"),
    ("lr = [{until = 1.0, shape = 'power'}]", 'piece 1 must have exponent with shape = "power", and with no other'),
    ("lr = [{until = 1.0, exponent = 2}]", 'piece 1 must have exponent with shape = "power"'),
    ("lr = [{until = 1.0, shape = 'power', exponent = 0}]", "piece 1: exponent must be in (0, 100], got 0"),
    ("lr = [{until = 1.0, from = 0.5, to = 0.5}]", "muon's schedule.lr goes up to 0.5 of the optimizer's lr in the"),
    ("lr = [{until = 1.0}, {until = 1.0}]", "piece 2: until = 1.0 is step 30, not after step 30"),
    (SHORT + "lr = [{until = 1.0}]", "schedule has both lr and cooldown_frac and final_lr_frac: drop cooldown_frac"),
    ("cooldown_frac = 0.5", "schedule lacks the key 'final_lr_frac', or lr for every role"),
    ("[schedule.embed]\nlr = [{until = 1.0}]", "lacks the keys 'cooldown_frac', 'final_lr_frac', or lr for every role"),
    (SHORT + "momentum = [{until = 1.0, to = 1.0}]", "schedule.momentum piece 1: to must be in [0, 1), got 1.0"),
    (SHORT + "planned_steps = 29", "schedule.planned_steps must be at least train.steps = 30, where the run ends"),
    (SHORT + "planned_steps = 0", "schedule.planned_steps must be at least"),
    (SHORT + "planned_steps = 40.0", "schedule.planned_steps must be a whole number, got 40.0"),
    (SHORT + "planned_steps = 10000000", "and at most 1000000, got 10000000"),
    (SHORT + "betas = [{until = 1.0}]", "schedule has an unknown key 'betas'"),
    (SHORT + "embed = [{until = 1.0}]", "schedule.embed must be a table, got"),
    (SHORT + "[schedule.head]\nbetas = []", "schedule.head has an unknown key 'betas'"),
    (SHORT + "[schedule.vector]\nweight_decay = 1", "schedule.vector.weight_decay must be a list as"),
    (SHORT + "[schedule.embed]\nmomentum = [{until = 1.0}]", "schedule.embed.momentum changes nothing: muon has no "),
    (SHORT + "[optimizer.muon.schedule]\ncooldown_frac = 0.5", "optimizer.muon.schedule has an unknown key 'cooldown_"),
    (SHORT + "[optimizer.muon]\nschedule = 3", "optimizer.muon.schedule must be a table, got 3"),
    (
        "lr = [{until = 1.0}]\n[optimizer.muon]\nwarmup_steps = 3",
        "optimizer.muon.warmup_steps = 3 is for the short form: drop it, and begin lr with a rising piece",
    ),
]  # fmt: skip


@pytest.mark.parametrize("schedule, message", REFUSED, ids=range(len(REFUSED)))
def test_a_bad_schedule_exits_2_with_one_line(tiny_track, tmp_path, capsys, schedule, message):
    path, table = tmp_path / "tiny.toml", tiny_table("muon")
    if "[optimizer.muon]" in schedule:
        schedule, table = schedule.replace("[optimizer.muon]", table), ""
    text = TINY_TRACK.format(folder=tiny_track.parent).partition("[schedule]")[0]
    path.write_text(f"{text}{table}\n[schedule]\n{schedule}\n")
    assert train_here(path, tmp_path / "out", "--optimizer", "muon") == Exit.CONFIG
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "out").exists()


def test_momentum_for_an_optimizer_without_one_is_refused(tiny_track):
    override = "schedule.momentum=[{until = 1.0, to = 0.5}]"
    assert make_run(tiny_track, "muon", override)[0].rule.param_groups[0]["peak_momentum"] == 0.95
    with pytest.raises(HarnessError, match=r"schedule.momentum changes nothing: adamw has no parameter group with mom"):
        make_run(tiny_track, "adamw", override)


# ---- rows of the public board: https://github.com/KellerJordan/modded-nanogpt, records/track_3_optimization ----


def cooldown(frac, planned, power=1.0, floor=0.0):
    def share(step):
        left = (1 - step / planned) / frac
        return 1.0 if step / planned < 1 - frac else floor + (1 - floor) * left**power

    return share


def power_cool(lr, factor, end=2900):
    return lambda step: min(lr, factor * (end - step) ** 1.2) / lr


def hot_start(step):  # of AdamH's matrices
    return step / 250 if step < 250 else 1 - step / 4875


def muon_momentum(step):
    if step < 300:
        return 0.85 + 0.1 * step / 300
    return 0.95 - 0.1 * (step - 2700) / 200 if step > 2700 else 0.95


# Row: steps that it runs, its schedule as TOML, and as the row's script has it, by role and key.
ROWS = {
    "36: Muon": (
        *(3250, "lr = [{until = 0.3}, {until = 1.0, to = 0.0}]"),
        {"matrix.lr": cooldown(0.7, 3250), "embed.lr": cooldown(0.7, 3250)},
    ),
    "4: AdamH": (
        4875,
        """lr = [{until = 0.6}, {until = 1.0, to = 0.0}]
        [schedule.matrix]
        lr = [{until = 250, from = 0.0}, {until = 1.0, from = 0.9487179487179487, to = 0.0}]""",
        {"matrix.lr": hot_start, "head.lr": cooldown(0.4, 4875)},
    ),
    "5: MuonH": (
        *(3325, "lr = [{until = 0.6}, {until = 1.0, to = 0.0}]\nmatrix = {lr = [{until = 1.0, to = 0.0}]}"),
        {"matrix.lr": cooldown(1.0, 3325), "vector.lr": cooldown(0.4, 3325)},
    ),
    "10: NorMuon, planned to 3300": (
        *(3250, "planned_steps = 3300\nlr = [{until = 0.3}, {until = 1.0, to = 0.0}]"),
        {"matrix.lr": cooldown(0.7, 3300), "embed.lr": cooldown(0.7, 3300)},
    ),
    "12: Muon, planned to 3350": (
        *(3325, "planned_steps = 3350\ncooldown_frac = 0.7\nfinal_lr_frac = 0.0"),
        {"matrix.lr": cooldown(0.7, 3350), "embed.lr": cooldown(0.7, 3350)},
    ),
    "25: KL-SOAP-H, planned to 3125": (
        3040,
        """planned_steps = 3125
        lr = [{until = 0.6}, {until = 1.0, to = 0.04, shape = "power", exponent = 1.5}]
        [schedule.matrix]
        lr = [{until = 1.0, to = 0.017, shape = "power", exponent = 1.5}]""",
        {"matrix.lr": cooldown(1.0, 3125, 1.5, 0.017), "embed.lr": cooldown(0.4, 3125, 1.5, 0.04)},
    ),
    "27: SOAP-H, its matrices planned to 3200": (
        3125,
        """planned_steps = 3200
        lr = [{until = 1875}, {until = 3125, to = 0.0}]
        [schedule.matrix]
        lr = [{until = 1.0, to = 0.0, shape = "power", exponent = 1.25}]""",
        {"matrix.lr": cooldown(1.0, 3200, 1.25), "embed.lr": cooldown(0.4, 3125)},
    ),
    "37: MuonH": (
        *(3250, "lr = [{until = 0.15}, {until = 1.0, to = 0.0}]\nmatrix = {lr = [{until = 1.0, to = 0.0}]}"),
        {"matrix.lr": cooldown(1.0, 3250), "embed.lr": cooldown(0.85, 3250)},
    ),
    "44: SOAP-Muon, planned to 2900": (
        2750,
        """planned_steps = 2900
        lr = [{until = 1487}, {until = 1.0, to = 0.0, shape = "power", exponent = 1.2}]
        [schedule.matrix]
        lr = [{until = 0.17710344827586206, to = 1.0}, {until = 1.0, to = 0.0, shape = "power", exponent = 1.2}]
        momentum = [{until = 300, from = 0.85}, {until = 2700}, {until = 1.0, to = 0.85}]""",
        {
            "matrix.lr": power_cool(0.0375, 3.3169534699576625e-06),
            "embed.lr": power_cool(0.3, 4.976805410800738e-05),
            "head.lr": power_cool(1 / 320, 5.184172302917436e-07),
            "matrix.momentum": muon_momentum,
        },
    ),
}


@pytest.mark.parametrize("row", ROWS)
def test_public_rows_can_be_written(row):
    steps, schedule, formulas = ROWS[row]
    config = parsed(schedule, steps=steps)
    for name, formula in formulas.items():
        role, _, key = name.partition(".")
        found = values(config, role, peak_momentum=0.95)[key]
        np.testing.assert_allclose(found, [formula(step) for step in range(steps)], rtol=1e-11, atol=1e-15)


# ---- what a record cannot claim ----


@pytest.fixture
def record(scheduled_run):
    return copy.deepcopy(events(scheduled_run[0]))


def at(step, key, factor):
    """Another value of one setting in the event of one step."""

    def change(record):
        (event,) = [event for event in record if event["event"] == "train" and event["step"] == step]
        table = event if key == "lr" else event["scheduled"]
        table[key] = table[key] * factor

    return change


def in_all(change_scheduled):
    return lambda record: [change_scheduled(event["scheduled"]) for event in record if event["event"] == "train"]


def claimed(change_schedule):
    """Another schedule in the config."""

    def change(record):
        change_schedule(record[0]["config"]["schedule"])

    return change


def track_changed(old, new):
    """Another track, and the config that it gives."""

    def change(record):
        start = record[0]
        start["sources"]["scheduled.toml"] = start["sources"]["scheduled.toml"].replace(old, new)
        start["config"] = json.loads(json.dumps(recorded(config_of(record))))

    return change


def config_of(record):
    return parse_config(record[0]["sources"]["scheduled.toml"], Path("scheduled.toml"), "muon")


def as_if(old, new):
    """Another schedule in the config, and the values that it gives in the events; the track is as it was."""

    def change(record):
        text = record[0]["sources"]["scheduled.toml"]
        track_changed(old, new)(record)
        config = config_of(record)
        record[0]["sources"]["scheduled.toml"] = text
        for event in (event for event in record if event["event"] == "train"):
            for group in record[0]["param_groups"]:
                for key, value in train_gpt.scheduled(event["step"] - 1, group, config).items():
                    table, name = (event, key) if (group["role"], key) == ("matrix", "lr") else (event["scheduled"], "")
                    table[name or f"{group['role']}.{key}"] = value

    return change


def swapped(one, other):
    def swap(values):
        values[one], values[other] = values[other], values[one]

    return in_all(swap)


def claimed_by_argv(record):
    record[0]["argv"] += ["--set", "schedule.planned_steps=31"]


def peak(role, key, value):
    """Another value in the optimizer that a schedule began from, and what follows from it."""

    def change(record):
        (group,) = [group for group in record[0]["param_groups"] if group["role"] == role]
        factor = value / group[key] if group[key] else 1.0
        group[f"peak_{key}"] = value
        in_all(lambda values: values.update({f"{role}.{key}": values[f"{role}.{key}"] * factor}))(record)

    return change


def no_peak(record):
    del record[0]["param_groups"][0]["peak_momentum"]
    in_all(lambda values: values.pop("matrix.momentum"))(record)


def no_momentum_at_all(record):
    no_peak(record)
    del record[0]["config"]["schedule"]["momentum"]


def early_stop_of_the_schedule(record):
    record[0]["config"]["train"]["steps"] = 36


def no_scheduled(record):
    for event in record:
        event.pop("scheduled", None)


TAMPERED = {
    "lr of a step": (at(7, "lr", 1.001), "step 7: lr 0.02002"),
    "lr of the last step": (at(30, "lr", 0.5), "step 30: lr"),
    "lr by a billionth": (at(20, "lr", 1 + 1e-9), "step 20: lr"),
    "lr of all steps": (lambda r: [at(step, "lr", 2.0)(r) for step in range(1, 31)], "step 1: lr"),
    "decay of a step": (at(9, "matrix.weight_decay", 1.1), "step 9: matrix.weight_decay"),
    "momentum of a step": (at(25, "matrix.momentum", 1.01), "step 25: matrix.momentum"),
    "the table's momentum": (in_all(lambda v: v.update({"matrix.momentum": 0.95})), "step 1: matrix.momentum 0.95"),
    "lr of another role at a step": (at(3, "head.lr", 0.9), "step 3: head.lr"),
    "lr of roles swapped": (swapped("embed.lr", "head.lr"), "step 1: embed.lr"),
    "lr of all roles for one": (in_all(lambda v: v.update({"embed.lr": v["vector.lr"]})), "step 1: embed.lr"),
    "decay of roles swapped": (swapped("matrix.weight_decay", "head.weight_decay"), "step 1: matrix.weight_decay 0.0"),
    "nothing logged": (no_scheduled, "step 1: scheduled lacks embed.lr"),
    "one not logged": (in_all(lambda v: v.pop("vector.weight_decay")), "scheduled lacks vector.weight_decay"),
    "momentum of AdamW": (in_all(lambda v: v.update({"embed.momentum": 0.9})), "scheduled has embed.momentum"),
    "lr twice": (in_all(lambda v: v.update({"matrix.lr": 0.02})), "scheduled has matrix.lr"),
    "no table": (lambda r: r[2].update(scheduled=[1.0]), "scheduled is [1.0], not a dict of a number"),
    "no number": (in_all(lambda v: v.update({"embed.lr": None})), "not a dict of a number from 0"),
    "negative": (at(5, "matrix.momentum", -1), "train event: scheduled is {"),
    "another plan": (claimed(lambda s: s.update(planned_steps=30)), "schedule.planned_steps is 30, by the embedded"),
    "no plan": (claimed(lambda s: s.pop("planned_steps")), "schedule.planned_steps is None, by the embedded"),
    "plan as a float": (claimed(lambda s: s.update(planned_steps=36.0)), "schedule.planned_steps is 36.0, by"),
    "stop at the plan's end": (early_stop_of_the_schedule, "train.steps is 36, by the embedded track and argv 30"),
    "a plan by argv alone": (claimed_by_argv, "schedule.planned_steps is 36, by the embedded track and argv 31"),
    "a plan with its values": (as_if("planned_steps = 36", "planned_steps = 40"), "schedule.planned_steps is 40, by"),
    "until": (claimed(lambda s: s["lr"][0].update(until=5)), "schedule.lr is [{'until': 5"),
    "a step for a share": (claimed(lambda s: s["lr"][2].update(until=1)), "schedule.lr is ["),
    "from": (claimed(lambda s: s["lr"][0].update({"from": 0.5})), "schedule.lr is ["),
    "to": (claimed(lambda s: s["weight_decay"][0].update(to=0.0)), "schedule.weight_decay is ["),
    "shape": (claimed(lambda s: s["lr"][2].pop("shape")), "schedule.lr is ["),
    "shape with its values": (as_if('"cosine"', '"sqrt"'), "schedule.lr is ["),
    "exponent": (claimed(lambda s: s["embed"]["lr"][1].update(exponent=2.0)), "schedule.embed is {"),
    "a piece less": (claimed(lambda s: s["momentum"].pop(1)), "schedule.momentum is ["),
    "a piece more": (claimed(lambda s: s["momentum"].append({"until": 1.0})), "schedule.momentum is ["),
    "pieces in another order": (claimed(lambda s: s["lr"].reverse()), "schedule.lr is ["),
    "no schedule of a role": (claimed(lambda s: s.pop("embed")), "schedule.embed is None, by"),
    "schedule of another role": (claimed(lambda s: s.update(head=s.pop("embed"))), "schedule.head is {"),
    "the short form, too": (claimed(lambda s: s.update(cooldown_frac=0.4)), "schedule.cooldown_frac is 0.4, by"),
    "a warm-up, too": (lambda r: r[0]["config"].update(warmup_steps=4), "warmup_steps is 4, by the embedded track"),
    "another track and config": (track_changed("until = 4,", "until = 5,"), "step 2: lr"),
    "another track's momentum": (track_changed("from = 0.85", "from = 0.9"), "step 1: matrix.momentum"),
    "another track's decay": (track_changed("to = 0.2", "to = 0.0"), "step 2: matrix.weight_decay"),
    "momentum that it began from": (peak("matrix", "momentum", 0.9), "held peak_momentum 0.9 for matrix, by its code"),
    "decay that it began from": (peak("matrix", "weight_decay", 0.1), "held peak_weight_decay 0.1 for matrix"),
    "decay of AdamW": (peak("head", "weight_decay", 0.1), "held peak_weight_decay 0.1 for head"),
    "no momentum to begin from": (no_peak, "group of matrix lacks peak_momentum, the schedule of its momentum has"),
    "no momentum at all": (no_momentum_at_all, "schedule.momentum is None, by the embedded track"),
    "a momentum of AdamW": (
        lambda r: r[0]["param_groups"][1].update(peak_momentum=0.9),
        "the parameter group of embed has peak_momentum, the schedule of its momentum has none",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TAMPERED)
def test_a_tampered_schedule_is_refuted(name, record, tmp_path):
    tamper, reason = TAMPERED[name]
    tamper(record)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(event) + "\n" for event in record))
    reasons = verify_run(path).reasons
    assert any(reason in found for found in reasons), reasons


def test_an_override_may_give_an_optimizer_a_schedule_that_the_track_has_not(tiny_track):
    config = load_config(tiny_track, "muon", ["optimizer.muon.schedule.matrix.lr=[{until = 1.0, to = 0.0}]"])
    assert config.schedule.matrix == {"lr": [{"until": 1.0, "to": 0.0}]}
    with pytest.raises(HarnessError, match="optimizer.muon.schedule has an unknown key 'matrixx'"):
        load_config(tiny_track, "muon", ["optimizer.muon.schedule.matrixx.lr=[{until = 1.0, to = 0.0}]"])
