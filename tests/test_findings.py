"""The page of claims, from records made up here; and the plot of neurons."""

import json
import re
import shutil
import tomllib

import pytest

from scripts import findings, plot
from scripts import neurons as neurons_plot
from tests.test_leaderboard import record

EXPANSIONS = (2, 4, 8)
ARMS = ("muon", "muon_scaled", "unormuon", "aurora_tall", "aurora_both")


def look(step, low, rows=100):
    """Telemetry in which this many rows of both layers have been low at every look."""
    matrix = {"low_streaks": [low] * 30, "leverage_histogram": [low, *[0] * 19, rows - low], "starved": 1}
    matrix |= {"update_cv": 0.1, "update_quantiles": [1] * 5, "starved_momentum": 0, "effective_rank": 2.0}
    names = [f"blocks.{layer}.mlp.{kind}" for layer in (0, 1) for kind in ("up", "down")]
    return {
        "event": "neurons", "step": step, "tokens": 8, "width": rows, "dead": 0.1, "silent": 0.0, "starved": 0.1,
        "starved_momentum": 0.0, "layers": [{"dead": 8, "silent": 0, "still_dead": 0}] * 2,
        "matrices": dict.fromkeys(names, matrix),
    }  # fmt: skip


def write_run(folder, optimizer, seed, end, low=0, steps=200, expansion=4, lr=0.1, time_s=10.0):
    start, *validations, last = (
        json.loads(x) for x in record(optimizer, seed, (4.0, 3.0, end), steps=steps).splitlines()
    )
    model = {"vocab_size": 64, "num_layers": 2, "model_dim": 4, "mlp_expansion": expansion, "mlp": "swiglu"}
    model["activation_dtype"] = "bfloat16"
    start["run_id"] = f"{optimizer}-{seed}-{steps}-{expansion}-{lr}"
    start["config"] |= {"model": model, "eval": {"target": 2.0, "tokens": 512}}
    start |= {"task_hash": f"{steps}abcd{expansion}", "params_by_role": {"matrix": 100}}
    start["hparams"] = {"lr": lr, "momentum": 0.9, "variant": "iterated" if optimizer in ARMS else "folded"}
    last["train_time_s"] = time_s + seed / 10
    folder.mkdir(parents=True, exist_ok=True)
    lines = [start, *validations, *(look(step, low) for step in (100, 150, steps)), last]
    path = folder / f"{start['run_id']}.jsonl"
    path.write_text("".join(json.dumps(event) + "\n" for event in lines))


def write_trial(folder, ends, lows, wave=0.001):
    for place, arm in enumerate(ARMS):
        for seed in range(6):
            end = ends[arm] + wave * ((seed + place) % 3)
            write_run(folder, arm, seed, end, lows[arm] + (seed + 1) * (place + 2) % 5)


ENDS = {"muon": 1.5, "muon_scaled": 1.5, "unormuon": 1.4, "aurora_tall": 1.3, "aurora_both": 1.2}
LOWS = {"muon": 40, "muon_scaled": 40, "unormuon": 5, "aurora_tall": 3, "aurora_both": 0}


@pytest.fixture
def results(tmp_path):
    """Aurora before U-NorMuon before Muon before AdamW; Muon alone leaves rows low; the gain grows with width."""
    for seed in (0, 1, 2):
        for optimizer, end in {"aurora": 1.0, "unormuon": 1.2, "muon": 1.5, "adamw": 2.5}.items():
            write_run(tmp_path / "quick", optimizer, seed, end, time_s=10.2 if optimizer == "aurora" else 10.0)
        for expansion in EXPANSIONS:
            write_run(tmp_path / "wide", "muon", seed, 1.5, expansion=expansion)
            write_run(tmp_path / "wide", "aurora", seed, 1.5 - 0.1 * expansion * (1 + seed / 100), expansion=expansion)
        write_run(tmp_path / "long", "muon", seed, 1.2, low=50 + seed, steps=500)
    write_trial(tmp_path / "t", ENDS, LOWS)
    for arm in ARMS:
        for lr in (0.1, 0.2):
            write_run(tmp_path / "t_tuning", arm, 100, 1.5, lr=lr)
    for seed in range(3):
        write_run(tmp_path / "t", "muon", seed, 1.7 + seed / 100, lr=0.2)
    design = (findings.ROOT / "results/trial.toml").read_text()
    design = design[: design.index("[arms]")].replace('folder = "trial"', 'folder = "t"')
    design = design.replace('"trial_tuning"', '"t_tuning"').replace("[1000, 1005]", "[0, 2]") + "[arms]\n"
    design += "".join(f"{arm} = {{ lr = 0.1, momentum = 0.9, seeds = [0, 5] }}\n" for arm in ARMS)
    (tmp_path / "trial.toml").write_text(design)
    words = (findings.ROOT / "results/findings.toml").read_text()
    start, end = words.index("[evidence]"), words.index("[pictures]")
    evidence = '[evidence]\ntrial = "trial.toml"\ntracks = ["quick"]\nlong = "long"\nexpansion = "wide"\n'
    evidence += 'older = [{ folder = "quick", but = "Nothing." }]\n'
    (tmp_path / "findings.toml").write_text(words[:start] + evidence + 'costs = ["cost.json"]\n' + words[end:])
    rounds = {"muon": {"rounds_ms": [10.0, 10.1, 9.9]}, "aurora folded": {"rounds_ms": [10.2, 10.3, 10.0]}}
    cost = {"speed": rounds, "config": "gpt2_small.toml", "device": "CPU", "schedule": "quintic12"}
    (tmp_path / "cost.json").write_text(json.dumps(cost))
    return tmp_path


@pytest.fixture
def not_rendered(monkeypatch):
    """Figures are made, but of their files only what --check looks for: for tests that read the page alone."""

    def write(figure, path, description=""):
        path.write_text(description)

    for module in (plot, neurons_plot):
        monkeypatch.setattr(module, "save_figure", write)


def verdicts(results):
    """By measure, from the table at the top, and the page."""
    assert findings.main(["--results", str(results)]) == 0
    page = (results / "FINDINGS.md").read_text()
    found = re.findall(r"^\| \d\. [^|]*\| \*\*(.*?)\*\*", page, re.MULTILINE)
    return dict(zip(findings.MEASURES, found, strict=True)), page


def test_claims_that_hold_are_supported_with_their_figures(results):
    found, page = verdicts(results)
    assert found.pop("cost") == "`folded`: supported; `iterated`: not tested" and found.pop("lr_range") == "described"
    assert set(found.values()) == {"supported"}
    lines = page.replace("\n  ", " ")
    assert "Aurora, tall alone minus U-NorMuon -0.1000 nats [" in lines and "Holm over 2" in lines
    assert "Muon minus U-NorMuon, 6 seeds: +34.67 points [" in lines
    assert "Trial, 6 seeds, Muon, at step 200: 42.0 % [" in lines and "from step 250 to 500: 51.0 % [" in lines
    assert "Muon: - (under way (0 of 3)) at 0.5 times the lr, +0.2090 nats [" in lines and "at 2 times the lr" in lines
    assert "Expansion factor 8, 3 seeds: Muon minus Aurora +0.8080 nats [" in lines
    for picture in ("t/leverage.png", "t_tuning/learning-rates.png"):
        assert (results / picture).read_bytes().startswith(b"\x89PNG") and f"]({picture})" in page


def test_claims_of_which_the_opposite_holds_are_contradicted(results, not_rendered):
    shutil.rmtree(results / "t")
    ends = {"muon": 1.2, "muon_scaled": 1.2, "unormuon": 1.3, "aurora_tall": 1.4, "aurora_both": 1.5}
    write_trial(results / "t", ends, {arm: 40 - low for arm, low in LOWS.items()})
    for seed in (0, 1, 2):
        for optimizer, end in {"aurora": 1.6, "unormuon": 1.55, "muon": 1.5, "adamw": 1.0}.items():
            write_run(results / "quick", optimizer, seed, end, time_s=12.0 if optimizer == "aurora" else 10.0)
        write_run(results / "long", "muon", seed, 1.2, low=5 + seed, steps=500)
        for expansion in EXPANSIONS:
            write_run(results / "wide", "aurora", seed, 1.4 + expansion / 50 * (1 + seed / 10), expansion=expansion)
    found, _ = verdicts(results)
    assert (
        found.pop("cost") == "`folded`: contradicted; `iterated`: not tested" and found.pop("lr_range") == "not tested"
    )
    assert set(found.values()) == {"contradicted"}


def test_small_differences_do_not_matter_and_others_stay_undecided(results, not_rendered):
    shutil.rmtree(results / "t")
    write_trial(results / "t", dict.fromkeys(ARMS, 1.4), dict.fromkeys(ARMS, 5))
    found, page = verdicts(results)
    assert found["aurora_beats_unormuon"] == "no difference that matters"
    assert found["unormuon_beats_muon"] == "no difference that matters", "though older runs say another thing"
    assert "Older, [quick](quick/README.md), 3 seeds: U-NorMuon minus Muon -0.3" in page.replace("\n  ", " ")
    assert found["rows_lose_leverage"] == "undecided"
    write_trial(results / "t", dict.fromkeys(ARMS, 1.4) | {"aurora_both": 1.35}, LOWS)
    found, _ = verdicts(results)
    assert (
        found["aurora_beats_unormuon"]
        == "Aurora, tall alone: no difference that matters; Aurora, tall and wide: supported"
    )
    write_trial(results / "t", dict.fromkeys(ARMS, 1.4), LOWS, wave=0.1)
    assert verdicts(results)[0]["aurora_beats_unormuon"] == "undecided"


def test_claims_without_records_are_not_tested_and_say_why(results):
    for folder in ("quick", "wide", "long", "t", "t_tuning"):
        shutil.rmtree(results / folder)
    found, page = verdicts(results)
    assert found.pop("cost") == "`folded`: not tested; `iterated`: not tested"
    assert set(found.values()) == {"not tested"} and page.count(findings.NO_RUNS) == 5 and "![" not in page


def test_no_verdict_before_all_runs_that_were_planned(results, not_rendered):
    (results / "t" / "aurora_tall-5-200-4-0.1.jsonl").unlink()
    found, page = verdicts(results)
    assert found["aurora_beats_unormuon"] == found["rows_lose_leverage"] == "under way (5 of 6)"
    assert "p = " not in page.partition("## 5.")[2].partition("- Older")[0]
    for seed in (0, 1, 2):  # and none where too many have diverged
        path = results / "t" / f"aurora_both-{seed}-200-4-0.1.jsonl"
        path.write_text(path.read_text().replace('"status": "done"', '"status": "diverged"'))
    found, _ = verdicts(results)
    assert "Aurora, tall and wide: diverged (3 of 6)" in found["aurora_beats_unormuon"]


def test_runs_that_cannot_be_compared_are_no_evidence(results, capsys):
    write_run(results / "quick", "muon", 9, 1.4, lr=0.3)
    assert findings.main(["--results", str(results)]) == 2
    assert "5 settings of 4 optimizers" in capsys.readouterr().err
    (results / "quick" / "muon-9-200-4-0.3.jsonl").write_text('{"text": "a document"}\n')
    assert findings.main(["--results", str(results)]) == 2
    assert "muon-9-200-4-0.3.jsonl" in capsys.readouterr().err


@pytest.mark.slow
def test_check_finds_a_page_or_picture_that_the_records_do_not_give(results, capsys):
    assert findings.main(["--results", str(results), "--check"]) == 1
    verdicts(results)
    assert findings.main(["--results", str(results), "--check"]) == 0
    write_run(results / "t", "muon", 0, 1.6, low=9)
    assert findings.main(["--results", str(results), "--check"]) == 1
    said = capsys.readouterr().err
    assert "FINDINGS.md is not what the records give" in said and "leverage.png is not what" in said
    verdicts(results)
    (results / "t" / "leverage.png").unlink()
    assert findings.main(["--results", str(results), "--check"]) == 1
    (results / "findings.toml").unlink()
    assert findings.main(["--results", str(results)]) == 2


def test_the_committed_page_is_what_the_records_give():
    assert findings.main(["--check"]) == 0


def test_the_words_of_the_page_state_no_figure_of_ours():
    words = tomllib.loads((findings.ROOT / "results/findings.toml").read_text())
    for claim in words["claim"]:
        for key in claim.keys() & {"reading", "change"}:
            assert len(claim[key]) > 20 and not re.search(r"\d\.\d|\d ?%|\d nats|\d steps", claim[key]), claim
    assert [claim["measure"] for claim in words["claim"]] == list(findings.MEASURES)


@pytest.mark.slow
def test_plot_of_neurons_and_of_runs_without_telemetry(results, tmp_path, monkeypatch, capsys):
    def draw(folder, name):
        monkeypatch.setattr("sys.argv", ["plot.py", "neurons", str(results / folder), "--out", str(tmp_path / name)])
        return plot.main()

    assert draw("quick", "n.svg") == 0 and b"dead neurons" in (tmp_path / "n.svg").read_bytes()
    assert draw("quick", "n.png") == 0 and (tmp_path / "n.png").read_bytes().startswith(b"\x89PNG")
    path = results / "quick" / "muon-0-200-4-0.1.jsonl"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if '"neurons"' not in line))
    assert draw("quick", "none.png") == 2 and "have no telemetry" in capsys.readouterr().err
