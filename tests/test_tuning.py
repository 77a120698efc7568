"""The tuning search on made-up losses, the track it writes, and one small search with real runs."""

import json
import math
import shutil

import pytest

from aurora.config import load_config, told_hparams
from aurora.errors import HarnessError
from aurora.trainer.record import read_folder, read_record
from scripts import tune
from scripts.analysis.tuning import Knob, Search, Trial, neighbours_tried, read_space, write_setting
from scripts.verification.checks import verify_folder
from tests.conftest import ROOT, start_process

SPACE = ROOT / "configs" / "tuning" / "quick.toml"


def bowl(**centre):
    """A loss with one minimum: at these values, in logarithms, and infinite for an lr more than 8 times too high."""

    def evaluate(number, knob, setting, why):
        if setting["lr"] > 8 * centre["lr"]:
            return math.inf
        return sum(math.log(setting[name] / value) ** 2 for name, value in centre.items())

    return evaluate


def knobs():
    return [
        Knob("lr", ["lr"], 0.01, factor=2),
        Knob("aux_lr", ["a", "b"], 0.01, factor=2),
        Knob("momentum", ["momentum"], 0.95, values=[0.9, 0.95, 0.98]),
    ]


@pytest.mark.parametrize("budget", [1, 5, 12, 20, 40])
@pytest.mark.parametrize("lr", [0.0011, 0.01, 0.013, 0.3])
def test_every_search_takes_exactly_its_budget_and_repeats_nothing(budget, lr):
    search = Search(knobs(), budget, bowl(lr=lr, aux_lr=0.03, momentum=0.9))
    search.run()
    assert [trial.number for trial in search.trials] == list(range(1, budget + 1))
    assert len({json.dumps(trial.setting) for trial in search.trials}) == budget


@pytest.mark.parametrize("lr", [0.003, 0.01, 0.05])
def test_search_finds_the_minimum_and_its_lr_lies_inside_what_was_tried(lr):
    search = Search(knobs(), 20, bowl(lr=lr, aux_lr=0.03, momentum=0.9))
    search.run()
    best = search.best.setting
    assert best["momentum"] == 0.9 and lr / 1.5 < best["lr"] < 1.5 * lr and 0.02 < best["aux_lr"] < 0.045
    below, above = neighbours_tried(search.trials, "lr")
    assert below.setting["lr"] < best["lr"] < above.setting["lr"]
    assert min(below.val_loss, above.val_loss) >= search.best.val_loss


def test_search_follows_the_declared_order_and_walks_on_while_the_edge_is_best():
    search = Search(knobs(), 12, bowl(lr=0.1, aux_lr=0.01, momentum=0.95))
    search.run()
    first = search.trials[:7]
    assert [trial.setting["lr"] for trial in first] == [0.01, 0.005, 0.02, 0.04, 0.08, 0.16, 0.08]
    assert [trial.knob for trial in first] == ["lr"] * 6 + ["aux_lr"] and first[0].why == "start"


def test_trials_that_diverge_count_and_are_never_chosen():
    search = Search(knobs(), 20, bowl(lr=0.002, aux_lr=0.01, momentum=0.95))
    search.run()
    too_high = [trial.setting["lr"] > 0.016 for trial in search.trials]
    assert [math.isinf(trial.val_loss) for trial in search.trials] == too_high and any(too_high)
    assert len(search.trials) == 20 and search.best.setting["lr"] < 0.004


@pytest.mark.parametrize("path", sorted(SPACE.parent.glob("*.toml")), ids=lambda path: path.stem)
def test_every_committed_space_fits_its_track(path):
    space = read_space(path)
    for optimizer, found in space.knobs.items():
        assert found[0].name == "lr"
        values = {key: knob.value(knob.first_position) for knob in found for key in knob.keys}
        overrides = [f"optimizer.{optimizer}.{key}={json.dumps(value)}" for key, value in values.items()]
        config = load_config(ROOT / "configs" / path.name, optimizer, [*space.overrides, *overrides])
        told = told_hparams(vars(config))
        assert all(json.loads(json.dumps(told[key])) == value for key, value in values.items()), optimizer
        assert config.eval.every >= config.train.steps // 4  # the loss at the end counts


@pytest.mark.parametrize(
    "entry, message",
    [
        ("{ start = 1 }", "needs either factor or values"),
        ("{ start = 1, factor = 2, values = [1] }", "needs either factor or values"),
        ("{ start = 3, values = [1, 2] }", "start = 3 is not among the values"),
        ("{ start = 0, factor = 2 }", "start must be above 0"),
        ("{ start = 1, step = 2 }", "unknown key 'step'"),
        ("5", "must be a table"),
    ],
)
def test_what_is_wrong_in_a_space_is_named(tmp_path, entry, message):
    path = tmp_path / "space.toml"
    path.write_text(f"seed = 1\n[muon]\nlr = {entry}\n")
    with pytest.raises(HarnessError, match=message):
        read_space(path)


def test_written_track_keeps_all_else_and_says_where_its_values_come_from():
    text = (ROOT / "configs/quick.toml").read_text()
    values = {"lr": 0.0625, "betas": [0.8, 0.9], "warmup_steps": 7}
    once = write_setting(text, "adamw", values, "20 trials, somewhere")
    assert write_setting(once, "adamw", values, "20 trials, somewhere") == once
    changed = [line for line in once.splitlines() if line not in text.splitlines()]
    assert changed == ["# Tuned: 20 trials, somewhere", "lr = 0.0625", "warmup_steps = 7", "betas = [0.8, 0.9]"]
    kept, comments = (
        [line for line in lines.splitlines() if line.startswith("#") and not line.startswith("# Tuned: ")]
        for lines in (once, text)
    )
    assert kept == comments
    with pytest.raises(ValueError, match="no line"):
        write_setting(text, "adamx", values, "")


TINY_SPACE = """
seed = 100
set = ["train.steps=4", "eval.every=1000"]
[muon]
lr = { start = 2e28, factor = 1e30 }
aux_lr = { keys = ["embed_lr", "head_lr", "vector_lr"], start = 0.003, factor = 2 }
[adamw]
lr = { start = 0.003, factor = 2 }
"""


@pytest.mark.slow
def test_tuning_runs_goes_on_and_writes_the_track(tiny_track, tmp_path, capsys):
    config, space, out = tmp_path / "tiny.toml", tmp_path / "space.toml", tmp_path / "tiny_tuning"
    shutil.copy(tiny_track, config)
    space.write_text(TINY_SPACE)

    command = ["--config", str(config), "--space", str(space), "--out", str(out), "--jobs", "2"]
    assert tune.main([*command, "--trials", "1"]) == 0
    process = start_process("scripts/compare.py", "tune", *command, "--trials", "2", "--write")
    output, err = process.communicate(timeout=240)
    assert (process.returncode, err) == (0, "")
    assert output.count("] found: ") == 2 and output.count("] done: ") == 2
    runs, errors = read_folder(out)
    assert len(runs) == 4 and not errors and len(list(out.glob("*.jsonl"))) == 4
    assert [verdict.reasons for verdict in verify_folder(out)] == [[]] * 4
    assert {run.start["env"]["variables"]["SPEEDRUN_JOBS"] for run in runs} == {"2"}
    ledger = json.loads((out / "ledger.json").read_text())
    assert [(entry["optimizer"], entry["trial"]) for entry in ledger] == [
        (optimizer, trial) for optimizer in ("adamw", "muon") for trial in (1, 2)
    ]
    by_name = {run.path.name: run for run in runs}
    for entry in ledger:
        run = by_name[entry["record"]]
        assert run.start["hparams"]["lr"] == entry["setting"]["lr"] and run.start["seed"] == 100
        assert entry["val_loss"] == (run.end["val_loss"] if run.is_done else None)
    diverged = [entry for entry in ledger if entry["status"] == "diverged"]
    assert [entry["setting"]["lr"] for entry in diverged] == [2e28], "and it is a trial"
    for optimizer in ("adamw", "muon"):
        best = min((e for e in ledger if e["optimizer"] == optimizer and e["val_loss"]), key=lambda e: e["val_loss"])
        assert load_config(config, optimizer).hparams["lr"] == best["setting"]["lr"]
    assert f"# Tuned: 2 trials, {out}" in config.read_text() and "(chosen)" in (out / "tuning.md").read_text()
    capsys.readouterr()
    assert tune.main([*command, "--trials", "2"]) == 0
    assert capsys.readouterr().out.count("] found: ") == 4, "values that are in the track now change no trial"


def test_lines_of_optimizers_that_are_not_searched_stay_in_ledger_and_page(tmp_path):
    folder, space = ROOT / "results" / "quick_tuning", read_space(SPACE)
    path = tmp_path / "ledger.json"
    shutil.copy(folder / "ledger.json", path)
    page = tune.report(tune.Ledger(path, []), space, tune.parse_args(["--trials", "16"]))
    assert page.split("\n\n", 1)[1] == (folder / "tuning.md").read_text().split("\n\n", 1)[1]
    ledger = tune.Ledger(path, ["aurora"])
    new = ledger.entries[-1] | {"optimizer": "aurora", "trial": 1}
    ledger.add(new)
    kept = json.loads(path.read_text())
    assert len(kept) == 49 and [entry for entry in kept if entry["optimizer"] == "aurora"] == [new]
    path.write_text('[{"optimizer": "muon"}]')
    with pytest.raises(HarnessError, match="ledger.json is not a list of trials"):
        tune.Ledger(path, [])


def test_space_of_another_track_is_not_taken(tmp_path, capsys):
    assert tune.main(["--config", "configs/gpt2_small.toml", "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "there is no search space" in err and "configs/tuning/gpt2_small.toml" in err and err.count("\n") == 1


def test_the_quick_tracks_values_are_the_best_of_its_committed_trials():
    folder = ROOT / "results" / "quick_tuning"
    ledger, space = json.loads((folder / "ledger.json").read_text()), read_space(SPACE)
    counts = {optimizer: sum(entry["optimizer"] == optimizer for entry in ledger) for optimizer in space.knobs}
    assert len(set(counts.values())) == 1 and sum(counts.values()) == len(ledger)
    for optimizer, knobs in space.knobs.items():
        entries = [entry for entry in ledger if entry["optimizer"] == optimizer]
        for entry in entries:
            run = read_record(folder / entry["record"])
            assert run.start["seed"] == space.seed and run.start["config"]["optimizer"] == optimizer
            assert entry["val_loss"] == (run.end["val_loss"] if run.is_done else None)
            table = run.start["config"]["hparams"] | {"warmup_steps": run.start["config"]["warmup_steps"]}
            assert all(table[key] == entry["setting"][knob.name] for knob in knobs for key in knob.keys)
        keys = ("trial", "knob", "setting", "why")
        losses = [math.inf if entry["val_loss"] is None else entry["val_loss"] for entry in entries]
        trials = [Trial(*(entry[key] for key in keys), loss) for entry, loss in zip(entries, losses, strict=True)]
        again = Search(knobs, len(trials), lambda number, *rest, losses=losses: losses[number - 1])
        again.run()
        assert again.trials == trials, f"{optimizer}: these are not the trials that the search makes"
        best = min(trials, key=lambda trial: trial.val_loss)
        config = load_config(ROOT / "configs" / "quick.toml", optimizer)
        chosen = config.hparams | {"warmup_steps": config.warmup_steps}
        assert all(chosen[key] == best.setting[knob.name] for knob in knobs for key in knob.keys)
        below, above = neighbours_tried(trials, "lr")
        assert below and above, f"{optimizer}: the chosen lr is at the edge of what was tried"
