"""The page of claims and the plot of neurons, from records made up here."""

import json
import re

import pytest

from scripts import findings, plot
from scripts import neurons as neurons_plot
from tests.test_leaderboard import record

EXPANSIONS = (2, 4, 8)


def neurons(step, starved, dead):
    matrix = {"update_cv": 0.1, "update_quantiles": [1] * 5, "starved": starved, "starved_momentum": 0}
    matrix["effective_rank"] = 2.0
    return {
        "event": "neurons", "step": step, "tokens": 8, "width": 16, "dead": dead / 16, "silent": 0.0,
        "starved": starved / 16, "starved_momentum": 0.0,
        "layers": [{"dead": dead, "silent": 0, "still_dead": 0}],
        "matrices": {"blocks.0.mlp.up": matrix, "blocks.0.mlp.down": matrix},
    }  # fmt: skip


def write_run(folder, optimizer, seed, losses, starved=0, dead=0, last=200, expansion=4, steps=200):
    start, *validations, end = (json.loads(line) for line in record(optimizer, seed, losses, steps=steps).splitlines())
    model = {"vocab_size": 64, "num_layers": 1, "model_dim": 4, "mlp_expansion": expansion}
    start["config"] |= {"model": model, "eval": {"target": 2.0, "tokens": 512}}
    start |= {"task_hash": f"0123abcd{expansion}", "params_by_role": {"matrix": 100}, "hparams": {"lr": 0.1}}
    end["train_time_s"] = 10.0 + seed + (0.2 if optimizer == "aurora" else 0.0)
    told = [neurons(10, starved, 0), neurons(last, starved + seed % 2, dead + seed % 2)]
    folder.mkdir(parents=True, exist_ok=True)
    lines = [start, *validations, *told, end]
    path = folder / f"{optimizer}-{seed}-{expansion}.jsonl"
    path.write_text("".join(json.dumps(event) + "\n" for event in lines))


@pytest.fixture
def results(tmp_path):
    """Aurora before U-NorMuon before Muon; AdamW never arrives; Muon alone starves rows; the gain grows with width."""
    ends = {"aurora": 1.0, "unormuon": 1.2, "muon": 1.5, "adamw": 2.5}
    for seed in (0, 1, 2):
        for optimizer, end in ends.items():
            starved, dead = (9, 8) if optimizer == "muon" else (0, 0)
            write_run(tmp_path / "quick", optimizer, seed, (4.0, 3.0, end), starved, dead)
            for expansion in EXPANSIONS if optimizer in ("aurora", "muon") else ():
                gain = 0.1 * expansion + seed / 100 if optimizer == "aurora" else 0
                write_run(tmp_path / "wide", optimizer, seed, (4.0, 3.0, 1.5 - gain), expansion=expansion)
    (tmp_path / "findings.toml").write_text(
        '[[setting]]\ntitle = "Quick"\nfolder = "quick"\ncommand = "one"\nnote = "All."\n'
        '[expansion]\nfolder = "wide"\ncommand = "two"\nnote = "Wide."\n[cost]\nfile = "cost.json"\n'
    )
    rounds = {"muon": {"rounds_ms": [10.0, 10.1, 9.9]}, "aurora folded": {"rounds_ms": [10.2, 10.3, 10.0]}}
    cost = {"speed": rounds, "config": "gpt2_small.toml", "device": "CPU", "command": "three"}
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
    assert findings.main(["--results", str(results)]) == 0
    page = (results / "FINDINGS.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ") and "**" in line]
    return {row[0].split(" ")[0]: row[1].strip(" *") for row in rows}, page


def claims_with(verdict, found):
    return {claim for claim in found if found[claim] == verdict}


def test_claims_that_hold_are_supported_with_their_figures(results):
    found, page = verdicts(results)
    supported = {"1.", "2a.", "2b.", "2c.", "3a.", "3b.", "4a.", "4b.", "5."}
    assert found == dict.fromkeys(supported, "supported") | dict.fromkeys(("2d.", "2e."), "not testable")
    assert "these runs end at step 200, where this is the share" in page and "loss at step 200" in page
    assert "| Muon's loss - Aurora's | 8                | 3     | +0.8100 [" in page
    assert "Muon's loss - U-NorMuon's" not in page, "U-NorMuon was not run at several widths"
    assert (results / "quick/findings-neurons.png").read_bytes().startswith(b"\x89PNG")


def test_claims_of_which_the_opposite_holds_are_contradicted(results, not_rendered):
    for seed in (0, 1, 2):
        write_run(results / "quick", "aurora", seed, (4.0, 3.0, 1.9), starved=9, dead=9, last=600)
        write_run(results / "quick", "unormuon", seed, (4.0, 3.0, 1.5), last=600)
        write_run(results / "quick", "muon", seed, (4.0, 3.0, 1.5), starved=9, dead=2, last=600)
        for expansion in EXPANSIONS:
            loss = 1.4 + expansion / 50 + seed / 900
            write_run(results / "wide", "aurora", seed, (4.0, 3.0, loss), expansion=expansion)
    rounds = {"muon": {"rounds_ms": [10.0, 10.1, 9.9]}, "aurora folded": {"rounds_ms": [11.2, 11.3, 11.0]}}
    table = json.loads((results / "cost.json").read_text()) | {"speed": rounds}
    (results / "cost.json").write_text(json.dumps(table))
    found, _ = verdicts(results)
    assert claims_with("contradicted", found) == {"2d.", "2e.", "3b.", "4b.", "5."}
    assert claims_with("undecided", found) == {"2b.", "3a."}


def test_figures_that_leave_both_possible_are_undecided(results, not_rendered):
    """Every p of claims 2 and 3 is 0.03: significant alone, as claim 1's is, and not as one of two."""
    ends = {"aurora": 1.5 - 0.027, "unormuon": 1.5, "muon": 1.5 + 0.027, "adamw": 1.5 + 0.054}
    for seed in (0, 1, 2):
        for optimizer, end in ends.items():
            starved = 4.778 if optimizer == "muon" else 4.0
            losses = (4.0, 3.0, end + 0.009 * seed)
            write_run(results / "quick", optimizer, seed, losses, starved, dead=3.9, last=600)
        for expansion in EXPANSIONS:
            loss = 1.4 - expansion / 500 + 0.1 * (seed == 1)
            write_run(results / "wide", "aurora", seed, (4.0, 3.0, loss), expansion=expansion)
    found, page = verdicts(results)
    assert found["1."] == "supported" and len(re.findall(r"p = 0\.0(59|6), Holm over 2;", page)) == 4
    undecided = {"2a.", "2b.", "2d.", "2e.", "3a.", "3b.", "5."}
    assert claims_with("undecided", found) == undecided
    for seed in (0, 1, 2):
        write_run(results / "quick", "muon", seed, (4.0, 3.0, 1.5), starved=3.9, last=600)
    assert verdicts(results)[0]["2c."] == "undecided", "25.4 % on average, 25 % within the interval"


def test_every_setting_has_a_column_and_schedules_of_unequal_length_are_compared_by_steps(results, not_rendered):
    path = results / "findings.toml"
    own = '[[setting]]\ntitle = "Own schedules"\nfolder = "own"\ncommand = "four"\nnote = "Noted."\n'
    path.write_text(own + path.read_text())
    lengths = {"muon": 200, "adamw": 600, "unormuon": 200, "aurora": 160}
    for seed in (0, 1, 2):
        for optimizer, steps in lengths.items():
            write_run(results / "own", optimizer, seed, (4.0, 3.0, 1.5), last=steps, steps=steps)
    _, page = verdicts(results)
    assert re.search(r"\| claim +\| Own schedules +\| Quick +\|", page) and "\n\nNoted.\n\n    four\n" in page
    assert re.search(r"\| 1\. Muon beats AdamW +(\| \*\*supported\*\* -[0-9.]+ (steps|nats) +){2}\|", page)
    assert re.search(r"3b\. .*steps.*Aurora arrived 3 of 3 times, U\\-NorMuon arrived 3 of 3 times", page)
    assert re.search(r"3a\. .*\*\*undecided\*\* +\| \+0\.0000 nats.*loss at step 200", page)
    for seed in (0, 1, 2):
        write_run(results / "own", "adamw", seed, (4.0, 3.0, 2.5), last=600, steps=600)
    assert re.search(r"1\. .*earlier in 100% of pairs of runs.*AdamW arrived 0 of 3 times", verdicts(results)[1])
    for seed in (0, 1, 2):  # which stops at step 160, before any other arrives
        write_run(results / "own", "aurora", seed, (4.0, 3.0, 2.5), last=160, steps=160)
    assert re.search(r"3b\. .*\*\*undecided\*\* +\| earlier in 0% of pairs", verdicts(results)[1])


def test_claims_without_records_are_not_testable_and_say_why(results):
    for path in [*results.glob("quick/*"), *results.glob("wide/*"), results / "cost.json"]:
        path.unlink()
    found, page = verdicts(results)
    assert set(found.values()) == {"not testable"} and len(found) == 11
    assert "no run of Muon, AdamW is recorded here" in page and "there are none" in page
    assert "Not comparable: no runs are recorded." in page


def test_runs_that_cannot_be_compared_are_no_evidence_and_the_page_says_why(results, not_rendered):
    for seed in (0, 1, 2):
        write_run(results / "wide", "muon", seed, (4.0, 3.0, 1.4), expansion=8, steps=300)
    path = results / "quick" / "muon-0-4.jsonl"
    other = path.read_text().replace('"lr": 0.1', '"lr": 0.2')
    path.with_name("muon-lr0.2.jsonl").write_text(other)
    found, page = verdicts(results)
    assert {verdict for claim, verdict in found.items() if claim != "4b."} == {"not testable"}
    assert "Not comparable: several settings of muon in one folder." in page
    assert "schedules of unequal length at factor 8" in page


def test_deaths_are_those_by_step_500_however_long_a_run_is(results, not_rendered):
    for seed in (0, 1, 2):
        for optimizer, dead in {"muon": 8, "unormuon": 1, "aurora": 2}.items():
            path = results / "quick" / f"{optimizer}-{seed}-4.jsonl"
            *lines, end = path.read_text().splitlines()
            dead += seed == 2  # or there would be no interval
            late = [json.dumps(neurons(500, 9, dead)), json.dumps(neurons(900, 9, 16 - dead))]
            path.write_text("\n".join([*lines, *late, end]) + "\n")
    found, page = verdicts(results)
    assert found["2d."] == found["2e."] == "supported" and re.search(r"2d\. .*52\.1 %.*at step 500", page)


@pytest.mark.slow
def test_check_finds_a_page_or_plot_that_the_records_do_not_give(results, capsys):
    assert findings.main(["--results", str(results), "--check"]) == 1
    verdicts(results)
    assert findings.main(["--results", str(results), "--check"]) == 0
    write_run(results / "quick", "muon", 0, (4.0, 3.0, 1.6), starved=9, dead=8)
    assert findings.main(["--results", str(results), "--check"]) == 1
    assert "FINDINGS.md is not what the records give" in capsys.readouterr().err
    verdicts(results)
    (results / "quick" / "findings-neurons.png").unlink()
    assert findings.main(["--results", str(results), "--check"]) == 1
    assert "findings-neurons.png is not what the records give" in capsys.readouterr().err
    (results / "findings.toml").unlink()
    assert findings.main(["--results", str(results)]) == 2


def test_copies_and_foreign_files_are_named_and_change_nothing(results, capsys):
    assert findings.main(["--results", str(results)]) == 0
    before, (path, *_) = (results / findings.PAGE).read_text(), sorted((results / "quick").glob("*.jsonl"))
    path.with_name(f"{path.stem} (1).jsonl").write_bytes(path.read_bytes())
    (path.parent / "data.jsonl").write_text('{"text": "a document"}\n')
    capsys.readouterr()
    assert findings.main(["--results", str(results)]) == 0
    said = capsys.readouterr().err
    assert (results / findings.PAGE).read_text() == before
    assert "data.jsonl" in said and said.count("warning: left out: ") == said.count("\n")


def test_the_committed_page_is_what_the_records_give():
    assert findings.main(["--check"]) == 0


@pytest.mark.slow
def test_plot_of_neurons_and_of_runs_without_telemetry(results, tmp_path, monkeypatch, capsys):
    def draw(folder, name):
        monkeypatch.setattr("sys.argv", ["plot.py", "neurons", str(results / folder), "--out", str(tmp_path / name)])
        return plot.main()

    assert draw("quick", "n.svg") == 0 and b"dead neurons" in (tmp_path / "n.svg").read_bytes()
    assert draw("quick", "n.png") == 0 and (tmp_path / "n.png").read_bytes().startswith(b"\x89PNG")
    path = results / "quick" / "muon-0-4.jsonl"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if '"neurons"' not in line))
    assert draw("quick", "none.png") == 2 and "have no telemetry" in capsys.readouterr().err
