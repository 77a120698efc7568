"""The pages of results and their plots, from records made up here and from the committed ones."""

import hashlib
import json
import re
import shutil

import numpy as np
import pytest

from aurora.trainer.record import read_folder
from scripts import compare, findings, leaderboard, plot
from scripts.analysis import report, verdict
from scripts.analysis.text import cell, markdown_table
from tests.conftest import ROOT, often

HOSTILE = "<script>alert(1)</script>|](http://evil)\n# x\x1b[31m![i](javascript:a) $\\frac$ `c` =1+1"


def record(optimizer="muon", seed=0, losses=(4.0, 3.0, 1.5), text="plain", steps=200, **changes):
    """Lines of a record, with a text of one's choice in every field that can hold one.

    losses: at points that are evenly spaced, with straight lines between them.
    """
    start = {
        "event": "run", "schema": 1, "run_id": text, "utc": text, "argv": [text], "optimizer": optimizer, "seed": seed,
        "task_hash": "0123abcd" + text, "world_size": 1, "device": "cpu", "compiled": False, "code_hash": text,
        "hparams": {"lr": 0.1, "note": text}, "git": {"commit": text, "dirty": True}, "sources": {f"{text}.toml": ""},
        "config": {
            "model": {"vocab_size": 64}, "eval": {"target": 2.0}, "train": {"steps": steps, "batch_tokens": 512},
        },
        "data": {"stream_id": text},
        "env": {"device_name": text, "cpu": text, "torch": text, "torch_threads": 1},
    }  # fmt: skip
    points = np.linspace(0, steps, len(losses))
    validations = [
        {"event": "val", "step": i, "val_loss": np.interp(i, points, losses) + seed / 1000, "train_time_s": i / 2}
        for i in range(0, steps + 1, 2)
    ]
    end = {
        "event": "end", "status": "done", "step": steps, "val_loss": losses[-1] + seed / 1000, "train_time_s": steps / 2
    }  # fmt: skip
    return "".join(json.dumps(event) + "\n" for event in (start | changes, *validations, end))


@pytest.fixture
def results(tmp_path):
    """A folder with two rules of three seeds each, and two tuning trials of one of them."""
    for folder, optimizer, seeds, losses in (
        ("quick", "muon", (0, 1, 2), (4.0, 3.0, 1.5)),
        ("quick", "adamw", (0, 1, 2), (4.0, 3.5, 2.5)),
        ("quick_tuning", "muon", (7, 8), (4.0, 3.0, 1.6)),
    ):
        (tmp_path / "results" / folder).mkdir(parents=True, exist_ok=True)
        for seed in seeds:
            path = tmp_path / "results" / folder / f"{optimizer}-{seed}.jsonl"
            path.write_text(record(optimizer, seed, losses))
    return tmp_path / "results"


def run(*arguments):
    return leaderboard.main([str(argument) for argument in arguments])


def pages_of(results):
    """The main page and those of the folders, by folder, without writing them."""
    pages = leaderboard.Pages(results, leaderboard.read_runs(results))
    return pages, {path.parent.name: text for path, text in pages.texts.items()}


def targets(page):
    """Of all links of a page, those by reference among them."""
    found = re.findall(r"(?<!\\)\]\(([^)]*)\)|^\[r\d+\]: (.*)$", re.sub("^    .*$", "", page, flags=re.M), re.M)
    return ["".join(target) for target in found]


def cells(page, rule):
    """The row of a rule in the table of a folder's page and its row of evidence, without the row's number."""
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in page.splitlines() if line[:2] == "| "]
    number = next(line[0] for line in lines if line[1] == rule)
    found = [line[1:] for line in lines if line[0] == number]
    return found[0], found[1]


def test_the_committed_pages_are_what_the_records_give(capsys):
    assert run("--check") == 0, capsys.readouterr().err


def test_the_main_page_is_short_and_begins_with_the_main_track():
    page = (ROOT / "results" / "README.md").read_text()
    headings = re.findall("^## (.*)$", page, re.M)
    assert len(page.splitlines()) <= 250 and headings[0] == "The quick track" and len(set(headings)) == len(headings)
    contents = re.findall(r"^- \[(.*)\]\(#(.*)\)$", page.partition("\n## ")[0], re.M)
    assert [name for name, _ in contents] == headings
    assert [link for _, link in contents] == [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]
    for folder in {path.relative_to(ROOT / "results").parts[0] for path in ROOT.glob("results/**/*.jsonl")}:
        assert f"({folder}/README.md)" in page, f"no link to the details of {folder}"


def test_links_of_all_pages_of_results_lead_somewhere_and_no_picture_is_stored_twice():
    shown = set()
    for path in ROOT.glob("results/**/*.md"):
        for target in targets(path.read_text()):
            if not target.startswith(("https://", "#")):
                shown.add((path.parent / target).resolve())
                assert (path.parent / target).exists(), f"{path} links {target}"
    pictures = [path.resolve() for path in ROOT.glob("results/**/*.png")]
    assert shown.issuperset(pictures)
    assert len({hashlib.sha256(path.read_bytes()).digest() for path in pictures}) == len(pictures)
    assert sum(path.stat().st_size for path in pictures) < 2e6


def test_page_is_stale_after_every_change_of_what_it_shows(results, capsys):
    assert run("--results", results, "--check") == 1
    assert run("--results", results) == 0 and run("--results", results, "--check") == 0
    (results / "quick" / "notes.md").write_text("What it shows.\n")
    assert run("--results", results, "--check") == 1
    assert run("--results", results) == 0
    for page in (results / "README.md", results / "quick" / "README.md"):
        assert "What it shows." in page.read_text()
    for page in (*results.glob("*/README.md"), results / "README.md"):
        text = page.read_text()
        page.write_text(text + "More.\n")
        capsys.readouterr()
        assert run("--results", results, "--check") == 1 and f"error: {page} is not" in capsys.readouterr().err
        page.write_text(text)
    path = results / "quick" / "muon-1.jsonl"
    path.write_text(path.read_text().replace("3.001", "3.0011"))
    capsys.readouterr()
    assert run("--results", results, "--check") == 1
    assert "curves-0123abcd.png is not what the records give" in capsys.readouterr().err


def test_row_counts_seeds_arrivals_and_tuning_trials(results):
    _, pages = pages_of(results)
    main, page = pages["results"], pages["quick"]
    # Straight line from 3 at step 100 to 1.5 at step 200: the target of 2 is met at 166.7.
    muon, muon_evidence = cells(page, "muon")
    assert muon[:7] == ["muon", "200", "3", "3/3", "166.7 [166.6, 166.9]", "83.4 [83.3, 83.4]", "A"]
    assert muon[7] == "2" and muon_evidence[4] == "168"
    adamw, adamw_evidence = cells(page, "adamw")
    assert adamw[2:6] == ["3", "0/3", "> 200.0", "> 100.0"] and adamw[7] == "0" and adamw_evidence[4] == "-"
    name = re.search(r"\[2\]\[(r\d+)\]", muon_evidence[-1])[1]
    assert f"[{name}]: muon-2.jsonl" in page and "muon-7.jsonl" not in page and "supported: muon is lower" in page
    row = ["muon", "200", "3/3", *muon[4:6], muon_evidence[0], "2", "[quick](quick/README.md)"]
    assert re.search(r" +\| ".join(map(re.escape, row)), main)
    assert "- **quick**: muon has a lower loss at the end than adamw." in main
    assert re.search(r"\| muon +\| 2 +\| 7 8 ", pages["quick_tuning"]) and "2 trials." in main


def test_longer_schedule_is_a_row_that_is_compared_by_its_arrival(results):
    """It never had the lower loss at a common step, and has it at its own end: neither counts."""
    for seed in range(3):
        slow = record(
            "normuon", seed, (4.0, 3.2, 1.4), steps=500, env={"device_name": "GPU", "torch": "2"}, device="cuda"
        )
        (results / "quick" / f"normuon-{seed}.jsonl").write_text(slow)
    page = pages_of(results)[1]["quick"]
    row, evidence = cells(page, "normuon")
    assert row[1:4] == ["500", "3", "3/3"] and float(row[4].split()[0]) > 400 and evidence[0] == "1.4010"
    assert {cells(page, "muon")[0][6], row[6]} == {"A", "B"} and "- machine B: " in page
    assert "supported: muon arrives before normuon" in page and "Schedules of 200, 500 steps" in page
    pair = next(line for line in page.splitlines() if line.startswith("| muon \\- normuon"))
    assert "steps to target" in pair and "loss at step" not in pair and pair.split(" | ")[5].strip() == "-"


def test_variation_of_a_track_has_a_table_of_its_own_and_is_not_set_beside_public_results(results):
    (results / "reference.toml").write_text(
        '[[track]]\nname = "tiny"\ntarget = 2.0\nbatch_tokens = 512\nvocab_size = 64\ntext = ""\nresult = []\n'
    )
    config = json.loads(record().splitlines()[0])["config"]
    sources = {"plain.toml": "[model]\nvocab_size = 64\nnum_layers = 2\n[eval]\nevery = 5\ntarget = 3.0\n"}
    for folder, head_dtype, num_layers in (("plain", "activation", 2), ("varied", "float8", 3)):
        (results / folder).mkdir()
        model = config["model"] | {"head_dtype": head_dtype, "num_layers": num_layers}
        changed = config | {"model": model, "eval": config["eval"] | {"every": 5}}
        text = record(config=changed, task_hash=folder, sources=sources)
        (results / folder / "muon-0.jsonl").write_text(text)
    _, pages = pages_of(results)
    name = "Track plain with head\\_dtype float8, num\\_layers 3: target 2, 512 tokens a step"
    assert f"## {name}\n\nTask varied." in pages["varied"] and f"\n{name}.\n" in pages["results"]
    assert "## Track plain: target 2, 512 tokens a step\n\nTask plain." in pages["plain"]
    assert pages["results"].count("| ours") == 3, "of the rules of quick, and of plain"


def test_page_of_a_record_that_lacks_what_it_shows_is_an_error_in_one_line(results, capsys):
    start, *rest = record(seed=5).splitlines()
    start = {key: value for key, value in json.loads(start).items() if key != "code_hash"}
    (results / "quick" / "muon-5.jsonl").write_text("\n".join([json.dumps(start), *rest]) + "\n")
    assert run("--results", results) == 2
    error = capsys.readouterr().err
    assert "a record lacks what the page shows (KeyError('code_hash'))" in error and error.count("\n") == 1


def test_failed_run_stays_in_its_row(results):
    path = results / "quick" / "muon-1.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if json.loads(line).get("step", 0) <= 150))
    page = pages_of(results)[1]["quick"]
    assert cells(page, "muon")[0][2:5] == ["3", "2/3", "> 161.2"]
    assert "without a final loss: seed 1 \\(cut short\\)" in page or "without a final loss: seed 1 (cut short)" in page


def test_text_of_a_record_is_text_on_the_page_and_in_the_plot(results):
    for seed in range(3):
        (results / "quick" / f"evil-{seed}.jsonl").write_text(record(HOSTILE, seed, (4.0, 3.0, 1.4), HOSTILE))
    assert run("--results", results) == 0
    for path in results.rglob("README.md"):
        page = path.read_text()
        outside_comment = page.replace(page.splitlines()[0], "")
        assert "<" not in outside_comment and "\x1b" not in page
        assert not re.search(r"(?<!\\)\]\((http|javascript)", page) and "\n# x" not in page
        for target in targets(page):
            assert target.startswith("#") or (path.parent / target).resolve().is_relative_to(results.resolve())
        for line in page.splitlines():
            if line.startswith("|"):
                assert len(re.findall(r"(?<!\\)\|", line)) in (8, 9, 10, 11), "a cell ran into the next"
    task = [found for found in read_folder(results / "quick")[0] if found.start["optimizer"] == HOSTILE]
    plot.plot_loss_curves(task, results / "evil.svg")
    assert "<script" not in (results / "evil.svg").read_text()


def test_text_of_a_record_is_text_in_the_report(results, capsys, monkeypatch):
    for seed in range(3):
        (results / "quick" / f"evil-{seed}.jsonl").write_text(record(HOSTILE, seed, (4.0, 3.0, 1.4), HOSTILE))
    monkeypatch.setattr("sys.argv", ["compare.py", "--report", str(results / "quick")])
    assert compare.main() == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said and "\n# x" not in said and "supported" in said
    groups = next(
        groups for task, groups in verdict.group_runs(read_folder(results / "quick")[0]).items() if "<" in task
    )
    text = report.markdown_report(groups, cell)
    assert "<script" not in text and "](http" not in text and "://" not in text


def test_records_behind_links_are_left_out(results, tmp_path, capsys):
    (tmp_path / "secret.jsonl").write_text(record())
    (results / "quick" / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    assert run("--results", results) == 0
    assert "links are not followed" in capsys.readouterr().err
    assert "link.jsonl" not in (results / "quick" / "README.md").read_text()


def test_add_names_what_is_no_record_and_goes_on(results, tmp_path, capsys):
    new = tmp_path / "mine"
    new.mkdir()
    (honest,) = (ROOT / "results" / "quick").rglob("*-adamw-s0-*.jsonl")
    for name in ("a.jsonl", "a (1).jsonl"):
        shutil.copy(honest, new / name)
    (new / "data.jsonl").write_text('{"text": "a document"}\n')
    assert run("add", new, "--results", results) == 0
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "data.jsonl, line 1: not an event" in said[0] and "a (1).jsonl" in said[1]
    assert [path.name for path in (results / "mine").glob("*.jsonl")] == ["a.jsonl"]


def test_add_copies_new_records_once_and_refuses_what_is_refuted(results, tmp_path, capsys):
    new = tmp_path / "mine"
    new.mkdir()
    (honest,) = (ROOT / "results" / "quick").rglob("*-adamw-s0-*.jsonl")
    shutil.copy(honest, new / "a.jsonl")
    assert run("add", new, "--results", results) == 0
    assert (results / "mine" / "a.jsonl").read_bytes() == honest.read_bytes()
    assert "(mine/README.md)" in (results / "README.md").read_text()
    assert "[0][r1]" in (results / "mine" / "README.md").read_text() and run("--results", results, "--check") == 0
    capsys.readouterr()
    assert run("add", new, "--results", results) == 2
    assert "has the losses and times of" in capsys.readouterr().err
    for text, reason in ((record(seed=6)[:-200], "no end event"), (record(seed=6), "is refuted: ")):
        shutil.rmtree(new)
        new.mkdir()
        (new / "b.jsonl").write_text(text)
        assert run("add", new, "--results", results) == 2
        assert reason in capsys.readouterr().err and not (results / "mine" / "b.jsonl").exists()


def test_add_without_space_for_all_adds_none(results, tmp_path, monkeypatch, capsys):
    new = tmp_path / "mine"
    new.mkdir()
    for path in sorted((ROOT / "results" / "quick").rglob("*-adamw-s[01]-*.jsonl")):
        shutil.copy(path, new)
    synced = []

    def fsync(file):
        synced.append(file)
        if len(synced) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fsync)
    before = sorted(results.rglob("*.*"))
    assert run("add", new, "--results", results) == 2
    assert "No space left" in capsys.readouterr().err and sorted(results.rglob("*.*")) == before
    assert run("--results", results) == 0
    assert run("add", new, "--results", results) == 0 and len(list(results.glob("mine/*.jsonl"))) == 2


@pytest.mark.parametrize("command", [leaderboard, findings])
def test_page_of_a_folder_that_is_not_there_is_an_error_in_one_line(tmp_path, capsys, command):
    for option in ([], ["--check"]):
        assert command.main(["--results", str(tmp_path / "nope"), *option]) == 2
        assert capsys.readouterr().err == f"error: there is no folder {tmp_path / 'nope'}\n"


def test_folder_is_labelled_by_what_differs_inside_and_its_notes_stand_once(results):
    for folder, lr, task in (("quick", 0.1, "x"), ("slow", 0.2, "x"), ("slow", 0.2, "y")):
        for seed in range(3):
            path = results / folder / f"muon-{task}-{seed}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text(record("aurora", seed, hparams={"lr": lr, "b_lr": lr}, task_hash=task))
    (results / "slow" / "notes.md").write_text("# Slow\n\nWhat it is,\nin short.\n\nHow it was made.\n")
    pages, text = pages_of(results)
    assert {group.label for groups in pages.pictures.values() for group in groups} == {"aurora", "muon", "adamw"}
    for folder in ("results", "slow"):
        assert "What it is, in short." in text[folder]
    assert "\n# Slow\n" in text["slow"] and text["slow"].count("How it was made.") == 1
    assert "How it was made." not in text["results"]
    assert "\nThe same task: [quick](../quick/README.md).\n" in text["slow"]


@pytest.mark.parametrize("suffix", [often("png", False), "svg"])
def test_plot_of_the_same_runs_has_the_same_bytes(tmp_path, suffix):
    runs, _ = read_folder(ROOT / "results" / "quick")
    for name in "ab":
        plot.plot_loss_curves(runs, tmp_path / f"{name}.{suffix}")
    assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


def test_plot_of_runs_without_a_common_validation(results):
    """One that fell before its first validation, one that never came near the target."""
    (results / "quick" / "adamw-9.jsonl").write_text(record("adamw", 9).splitlines()[0] + "\n")
    runs, _ = read_folder(results / "quick")
    plot.plot_loss_curves([run for run in runs if run.start["optimizer"] == "adamw"], results / "a.png")
    assert run("--results", results) == 0


def test_the_readme_shows_the_committed_table_of_the_quick_track():
    (groups,) = verdict.group_runs(read_folder(ROOT / "results" / "quick" / "comparison")[0]).values()
    hidden = ("n", "val loss at the end", "sd", "p below target", "gate", "of it optimizer")
    shown = [i for i, title in enumerate(report.HEADER) if title not in hidden]
    header, *rows = ([cells[i] for i in shown] for cells in (report.HEADER, *map(report.group_cells, groups)))
    assert markdown_table(header, rows) in (ROOT / "README.md").read_text()
