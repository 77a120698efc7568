"""Statistics of trials whose arms share seeds, against scipy and by brute force."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from aurora.trainer.record import Run
from scripts import trial
from scripts.analysis.trial import Trial, judged, paired, persistent_share
from tests.test_leaderboard import record


def test_paired_differences_are_those_of_scipy():
    rng = np.random.default_rng(0)
    a, b = ({seed: value for seed, value in enumerate(rng.normal(1.4, 0.01, 12))} for _ in range(2))
    found = paired(a, b | {99: 1.0})
    test = stats.ttest_rel(list(a.values()), list(b.values()))
    low, high = test.confidence_interval(0.95)
    assert (found.n, found.mean, found.p) == pytest.approx(
        (12, np.mean(list(a.values())) - np.mean(list(b.values())), test.pvalue)
    )
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.effect == pytest.approx(test.statistic / math.sqrt(12))
    assert paired(a | {3: math.inf}, b).n == 11


@pytest.mark.parametrize("values", [{}, {0: 1.0, 1: 2.0}, {0: 1.0, 1: 1.0, 2: 1.0}])
def test_too_few_pairs_and_equal_ones_are_not_tested(values):
    found = paired(values, {seed: 0.5 * value for seed, value in values.items()} if len(values) < 3 else values)
    assert math.isnan(found.p) and math.isnan(found.low) and found.n == len(values)


def test_verdicts_of_losses():
    def arm(mean, sd):
        wave = sd * np.array([-1, 1, -1, 1, -1, 1, -1, 1])
        return paired(dict(enumerate(1.4 + mean + wave)), dict.fromkeys(range(8), 1.4))

    cases = [arm(-0.01, 0.001), arm(0.01, 0.001), arm(0.0002, 0.002), arm(0.004, 0.02)]
    words = [word for _, word in judged(cases, margin=0.005)]
    assert words == ["better", "worse", "no difference that matters", "undecided"]
    assert judged([cases[3]] * 2, 0.005)[0][0] == pytest.approx(min(1, 2 * cases[3].p))


def test_persistent_rows_are_those_that_are_low_at_every_look():
    """By masks of all rows at all looks, made into streaks as the trainer does."""
    rng = np.random.default_rng(0)
    steps, rows = [20, 40, 60, 80, 100], 64
    chronic = rng.random((3, rows)) < 0.3
    masks = chronic | (rng.random((len(steps), 3, rows)) < 0.4)
    masks &= ~(rng.random((len(steps), 3, rows)) < 0.1)
    events = []
    for i, step in enumerate(steps):
        matrices = {}
        for j, name in enumerate(("gate", "up", "down")):
            lengths = [next((k for k in range(i + 1) if not masks[i - k, j, row]), i + 1) for row in range(rows)]
            streaks = [sum(length >= k for length in lengths) for k in range(1, max(lengths) + 1)]
            matrices[f"blocks.0.mlp.{name}"] = {"low_streaks": streaks, "leverage_histogram": [rows]}
        events.append({"step": step, "matrices": matrices})
    run = Run("a", {}, neuron_events=events)
    for first in (20, 50, 100):
        since = [i for i, step in enumerate(steps) if step >= first]
        assert persistent_share(run, first) == pytest.approx(masks[since][:, :2].all(axis=0).mean())
    with pytest.raises(ValueError, match="no telemetry of neurons from step 101"):
        persistent_share(run, 101)
    run.resumes.append({"step": 40})
    assert persistent_share(run, 50) == pytest.approx(masks[2:, :2].all(axis=0).mean())
    assert math.isnan(persistent_share(run, 20)), "it began to count anew"


def write_run(folder, arm, seed, lr, loss, low, is_diverged=False):
    start, *rest, end = record(
        arm, seed, (4.0, 2.0, loss - seed / 1000), hparams={"lr": lr, "momentum": 0.9}
    ).splitlines()
    matrix = {"low_streaks": [low] * 2, "leverage_histogram": [100]}
    looks = [
        {"event": "neurons", "step": step, "width": 100, "layers": [], "matrices": {"blocks.0.mlp.up": matrix}}
        for step in (100, 200)
    ]
    if is_diverged:
        end = json.dumps({**json.loads(end), "status": "diverged"})
    lines = [start, *rest, *map(json.dumps, looks), end]
    (folder / f"{arm}-{seed}-{lr}.jsonl").write_text("\n".join(lines) + "\n")


DESIGN = """
folder = "t"
tuning = "t_tuning"
first_look = 100
margin = 0.005
robust = ["a"]
robust_seeds = [0, 2]
loss = [["a", "b"]]
leverage = [["b", "a"]]
afterwards = [["b", "a"], ["c", "b"]]
[arms]
a = { lr = 0.02, momentum = 0.9, seeds = [0, 5] }
b = { lr = 0.03, momentum = 0.9, seeds = [0, 5] }
c = { lr = 0.03, momentum = 0.9, seeds = [0, 1] }
"""


def test_page_holds_every_endpoint_with_the_figures_of_the_records(tmp_path, capsys):
    (tmp_path / "trial.toml").write_text(DESIGN)
    assert trial.main(["--results", str(tmp_path)]) == 0
    assert "No record yet." in (tmp_path / "TRIAL_OUTCOME.md").read_text()

    folder = tmp_path / "t"
    folder.mkdir()
    rng = np.random.default_rng(0)
    a, b = 1.4 + 0.01 * rng.random((2, 6))
    low = rng.integers(0, 20, (2, 6))
    tuning = tmp_path / "t_tuning"
    tuning.mkdir()
    for lr, loss in ((0.02, 1.5), (0.04, 1.4)):
        for seed in (0, 100):
            write_run(tuning, "a", seed, lr, loss, 0)
    for seed in range(6):
        write_run(folder, "a", seed, 0.02, a[seed], int(low[0, seed]))
        write_run(folder, "b", seed, 0.03, b[seed] + 0.05, int(low[1, seed]))
        if seed < 3:
            write_run(folder, "a", seed, 0.04, a[seed] + 0.1 + seed / 100, 0)
    assert trial.main(["--results", str(tmp_path), "--check"]) == 1
    assert trial.main(["--results", str(tmp_path)]) == 0
    rows = {}
    for line in (tmp_path / "TRIAL_OUTCOME.md").read_text().splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            rows[cells[0], cells[1]] = cells[2:]
    mean = np.mean(a - b - 0.05)
    assert rows["a - b", "6"][0].startswith(f"{mean:+.4f} [") and rows["a - b", "6"][-1] == "better"
    assert rows["c - b", "0"] == ["-", "-", "-", "under way (0 of 2)"]
    text = (tmp_path / "TRIAL_OUTCOME.md").read_text()
    assert f"| b - a          | 6     | {np.mean(low[1] - low[0]):+.2f} [" in text
    assert rows["b - a", "6"][0].startswith(f"{-mean:+.4f} [")
    assert rows["b - a", "6"][-2:] == ["-", "under way (0 of 2)"], "Holm's correction takes all pairs of a table"
    assert rows["0.9", "0.02"] == ["1.5000"] and rows["0.9", "0.04"] == ["**1.4000**"]
    assert (
        rows["a", "2"][:2] == ["3/3", "3"] and rows["a", "2"][2].startswith("+0.1100 [") and rows["a", "2"][-1] == "-"
    )
    assert rows["a", "0.5"] == ["0/3", "0", "-", "-", "under way (0 of 3)"]
    assert rows["a", "0.02"][:2] == ["0.9", "6/6"] and rows["a", "0.02"][3].startswith(f"{np.mean(low[0]):.2f} [")
    assert trial.main(["--results", str(tmp_path), "--check"]) == 0

    for name, seed, hparams, said in (
        ("other", 1, {"lr": 0.02, "momentum": 0.9}, "are the same run of the trial"),
        ("other", 1, {"lr": 0.025, "momentum": 0.9}, "has lr 0.025 and momentum 0.9: not of the trial"),
        ("other", 1, {"lr": 0.02, "momentum": 0.8}, "not of the trial"),
        ("other", 7, {"lr": 0.02, "momentum": 0.9}, "has seed 7, which the trial has not"),
        ("other", 4, {"lr": 0.04, "momentum": 0.9}, "has seed 4, which the trial has not"),
        ("a-0-0.02", 0, {"lr": 0.02, "momentum": 0.9}, "has no telemetry of neurons"),
    ):
        (folder / "other.jsonl").unlink(missing_ok=True)
        (folder / f"{name}.jsonl").write_text(record("a", seed, (4.0, 3.0, 1.4), hparams=hparams | {"note": 1}))
        capsys.readouterr()
        assert trial.main(["--results", str(tmp_path)]) == 2
        assert said in capsys.readouterr().err


def test_runs_that_diverged_count_as_the_worst_of_their_arm_and_three_forbid_a_test(tmp_path):
    (tmp_path / "trial.toml").write_text(DESIGN)
    folder = tmp_path / "t"
    folder.mkdir()
    for seed in range(6):
        write_run(folder, "a", seed, 0.02, 1.4 + seed / 100, seed, is_diverged=seed < 2)
        write_run(folder, "b", seed, 0.03, 1.3 + seed**2 / 1000, 10)
        if seed < 3:
            write_run(folder, "a", seed, 0.04, 1.5, 0, is_diverged=True)
    found = Trial(tmp_path, "trial.toml")
    assert not found.flaw(("a", 1.0)) and found.losses("a")[0] == found.losses("a")[5] == max(
        found.losses("a").values()
    )
    assert found.shares("a") == {0: 5, 1: 5, 2: 2, 3: 3, 4: 4, 5: 5}
    assert found.loss_differences([("a", "b")])[0].n == 6
    write_run(folder, "a", 2, 0.02, 1.4, 0, is_diverged=True)
    found = Trial(tmp_path, "trial.toml")
    assert found.flaw(("a", 1.0)) == "diverged (3 of 6)" and found.loss_differences([("a", "b")])[0].n == 0
    assert trial.main(["--results", str(tmp_path)]) == 0
    text = (tmp_path / "TRIAL_OUTCOME.md").read_text()
    assert text.count("| diverged (3 of 6)") == 4 and "| diverged (3 of 3)" in text


def test_the_readme_states_the_trials_figures():
    found, text = Trial(trial.ROOT / "results", "trial.toml"), (trial.ROOT / "README.md").read_text()
    difference = found.loss_differences(found.design["loss"])[0]
    shares = {arm: np.mean(list(found.shares(arm).values())) for arm in ("muon", "unormuon", "aurora_tall")}
    text = text.replace("\n", " ")
    assert f"{-difference.mean:.4f} [{-difference.high:.4f}, {-difference.low:.4f}] nats below U-NorMuon's" in text
    assert f"in {difference.n} pairs" in text and f"Muon leaves {shares['muon']:.1f} % of the rows" in text
    assert f"U-NorMuon {shares['unormuon']:.1f} %, Aurora {shares['aurora_tall']:.1f} %" in text


def test_committed_page_is_what_the_records_give():
    assert trial.main(["--check"]) == 0
