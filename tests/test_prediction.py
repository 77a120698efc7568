"""The page that compares two orders of optimizers, from records made up here."""

import itertools
import json
import math
import re

import numpy as np
import pytest
from scipy import stats

from scripts import plot, prediction
from scripts.analysis.prediction import agreement, spearman
from tests.test_leaderboard import record

STEPS = {"a": 100, "b": 200, "c": 300, "d": 400, "e": 400}


def test_spearman_is_that_of_scipy_also_with_ties_and_infinities():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, (2, 200, 9)).astype(float)
    a[:, 0] = math.inf
    expected = [stats.spearmanr(*pair).statistic for pair in zip(a, b, strict=True)]
    assert spearman(a, b) == pytest.approx(expected, abs=1e-12)
    assert math.isnan(spearman(np.ones((1, 5)), a[:1, :5])[0])


def test_p_is_the_share_of_all_orders_that_agree_as_well():
    losses = {"a": [1.0, 1.1], "b": [1.3, 1.2], "c": [1.25, 1.1], "d": [1.5, 1.4], "e": [1.4, 1.6]}
    found = agreement(losses, STEPS)
    means, there = [np.mean(losses[name]) for name in STEPS], list(STEPS.values())
    assert found.rho == pytest.approx(stats.spearmanr(means, there).statistic)
    orders = [stats.spearmanr(order, there).statistic for order in itertools.permutations(means)]
    assert found.p == pytest.approx(np.mean(np.array(orders) >= found.rho - 1e-9), abs=0.01)
    assert found.interval.low < found.rho <= found.interval.high <= 1
    assert 0.5 < found.repeat < 1, "seeds overlap, so a second measurement orders them a little otherwise"


def test_orders_without_noise_agree_with_themselves():
    losses = {name: [steps / 100] * 3 for name, steps in STEPS.items()}
    found = agreement(losses | {"e": [math.inf] * 3}, STEPS | {"e": 500})
    assert (found.rho, found.interval.high, found.repeat) == pytest.approx((1, 1, 1))
    assert agreement(losses, {name: -steps for name, steps in STEPS.items()}).rho == pytest.approx(-1)
    with pytest.raises(ValueError, match="4 rules or more"):
        agreement({"a": [1.0]}, {"a": 1})


@pytest.fixture
def results(tmp_path):
    lines = ['verdict = "Yes."\n']
    reference = ['[[track]]\nname = "board"\n']
    for row, (name, steps) in enumerate(STEPS.items()):
        half = "design" if name != "e" else "confirmation"
        lines.append(f'[[rule]]\noptimizer = "{name}"\nrow = {row}\nhalf = "{half}"\n')
        reference.append(f"[[track.result]]\nrow = {row}\nsteps = {steps}\n")
        for seed in (5, 6):
            folder = tmp_path / "first"
            folder.mkdir(exist_ok=True)
            loss = 1 + steps / 1000 + seed / 100
            (folder / f"{name}-{seed}.jsonl").write_text(record(name, seed, (4.0, 3.0, loss)))
    for title, folder in (("First", "first"), ("Second", "second")):
        lines.append(f'[[track]]\ntitle = "{title}"\nfolder = "{folder}"\ncommand = "do it"\nnote = "A note."\n')
    (tmp_path / "prediction.toml").write_text("".join(lines))
    (tmp_path / "reference.toml").write_text("".join(reference))
    return tmp_path


def test_page_has_each_track_with_its_rho_and_is_stale_when_a_record_changes(results, monkeypatch, capsys):
    monkeypatch.setattr(plot, "save_figure", lambda figure, path, description: path.write_text(description))
    arguments = ["--results", str(results)]
    assert prediction.main(arguments) == 0
    page = (results / "PREDICTION.md").read_text()
    rows = re.findall(r"\| First +\|(.*)\|", page)
    for row, title in zip(rows, ("loss at the end", "steps to 1.4660"), strict=True):
        order, design, confirmation, both = (text.strip() for text in row.split("|"))
        assert order == title
        assert design.startswith("rho 1.00 [") and confirmation == "too few rules" and both.startswith("rho 1.00 [")
    assert "No record yet." in page
    assert re.search(r"\| d +\| 2 +\| 1\.4605 \[1\.3906, 1\.5304\] +\| 200 +\| 400 +\| 3 +\| design +\|", page), page
    # From 3.005 at step 100 to 1.155 at step 200, and from 3.006 to 1.166: at 1.466 at 183.2 and 183.7.
    assert re.search(r"\| a +\| 2 +\| 1\.1605 \[1\.0906, 1\.2304\] +\| 183 +\| 100 +\|", page), page
    assert prediction.main([*arguments, "--check"]) == 0

    (results / "first").rename(results / "first_tuning")
    toml = results / "prediction.toml"
    toml.write_text(toml.read_text().replace('"first"', '"first_tuning"'))
    assert prediction.main(arguments) == 0
    page = (results / "PREDICTION.md").read_text()
    assert re.search(r"\| d +\| 1 +\| 1\.4550 +\| 400 +\| 3 +\| design +\|", page), "the better of both seeds"
    assert "repeat" not in page.partition("## First")[0].partition("| track")[2] and "steps to 1" not in page
    (results / "first_tuning").rename(results / "first")
    toml.write_text(toml.read_text().replace('"first_tuning"', '"first"'))

    start, *rest = (results / "first" / "a-5.jsonl").read_text().splitlines()
    event = json.loads(start) | {"task_hash": "another"}
    (results / "first" / "a-5.jsonl").write_text("\n".join([json.dumps(event), *rest]) + "\n")
    capsys.readouterr()
    assert prediction.main([*arguments, "--check"]) == 2
    assert "2 tasks" in capsys.readouterr().err


def test_a_rule_without_a_row_or_half_is_named(results, capsys):
    path = results / "prediction.toml"
    path.write_text(path.read_text().replace('half = "confirmation"', 'half = "third"'))
    assert prediction.main(["--results", str(results)]) == 2
    assert "half of e must be design or confirmation, got 'third'" in capsys.readouterr().err
