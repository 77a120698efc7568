"""Reading records, the comparison, its plot."""

import json
import types

import pytest

from results.record import RecordError, Validation, read_folder, read_record
from scripts import compare
from tests.conftest import start_process


def record_lines(optimizer="muon", seed=0, losses=((0, 4.0), (10, 3.0), (20, 2.0)), target=2.5, status="done"):
    start = {
        "event": "run",
        "optimizer": optimizer,
        "seed": seed,
        "task_hash": "t",
        "world_size": 1,
        "config": {"eval": {"target": target}, "train": {"steps": 20, "batch_tokens": 512}},
        "env": {"device_name": "CPU", "torch": "2"},
        "argv": ["train_gpt.py"],
        "sources": {},
    }
    vals = [{"event": "val", "step": s, "val_loss": loss, "train_time_s": s * 0.5} for s, loss in losses]
    trains = [{"event": "train", "step": 10, "step_ms": 500.0, "optimizer_ms": 20.0 if optimizer == "muon" else 30.0}]
    end = {"event": "end", "status": status, "step": 20, "val_loss": losses[-1][1], "train_time_s": 10.0}
    return [json.dumps(event) for event in (start, *vals, *trains, end)]


def write(path, lines, end="\n"):
    path.write_text("\n".join(lines) + end)
    return path


def test_read_record_finds_the_first_look_at_the_target(tmp_path):
    run = read_record(write(tmp_path / "a.jsonl", record_lines()))
    assert run.is_done and run.first_at_target() == Validation(20, 2.0, 10.0)
    assert run.mean_ms("optimizer_ms") == 20.0
    assert read_record(write(tmp_path / "b.jsonl", record_lines(target=1.0))).first_at_target() is None


def test_read_record_drops_a_torn_line_and_knows_the_run_is_incomplete(tmp_path):
    lines = record_lines()
    run = read_record(write(tmp_path / "a.jsonl", [*lines[:3], lines[3][:20]], end=""))
    assert not run.is_done and [look.step for look in run.validations] == [0, 10]


def test_read_record_takes_the_later_of_two_lines_after_a_resume(tmp_path):
    lines = record_lines(status="interrupted")
    resume = json.dumps({"event": "resume", "step": 10})
    again = json.dumps({"event": "val", "step": 20, "val_loss": 1.5, "train_time_s": 11.0})
    run = read_record(write(tmp_path / "a.jsonl", [*lines, resume, again]))
    assert run.validations[-1] == Validation(20, 1.5, 11.0) and run.end is None


@pytest.mark.parametrize(
    "lines, message",
    [
        ([], "holds no event"),
        (["{"], "line 1: not an event"),
        (["[1]"], "line 1: not an event"),
        (['{"event": "val", "step": 1}'], "begins with a run event, not 'val'"),
        ([record_lines()[0], '{"event": "val", "step": 1}'], "line 2: not an event"),
    ],
)
def test_read_record_names_file_and_line_of_what_is_no_record(tmp_path, lines, message):
    path = write(tmp_path / "bad.jsonl", lines, end="\n" if lines else "")
    with pytest.raises(RecordError, match=message) as error:
        read_record(path)
    assert "bad.jsonl" in str(error.value)
    assert [str(e) for e in read_folder(tmp_path)[1]] == [str(error.value)]


def test_report_orders_by_loss_and_never_averages_over_the_seeds_that_made_it(tmp_path):
    write(tmp_path / "m0.jsonl", record_lines())
    write(tmp_path / "m1.jsonl", record_lines(seed=1, losses=((0, 4.0), (10, 3.0), (20, 2.6))))
    write(tmp_path / "a0.jsonl", record_lines("aurora", losses=((0, 4.0), (10, 2.4), (20, 1.9))))
    table = compare.report(read_folder(tmp_path)[0]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert cells[2] == ["aurora", "1", "1.9000", "", "1/1", "10", "5.0", "30.0", "500.0"]
    assert cells[3] == ["muon", "2", "2.3000", "0.4243", "1/2", "> 20", "> 10.0", "20.0", "500.0"]
    assert "aurora, 0.4000 below muon. n = 1 is a lead" in compare.verdict(read_folder(tmp_path)[0])


def test_verdict_says_when_the_seeds_cannot_tell_two_optimizers_apart(tmp_path):
    for seed, (muon, aurora) in enumerate([(2.0, 1.99), (2.1, 2.08), (1.9, 1.92)]):
        write(tmp_path / f"m{seed}.jsonl", record_lines(seed=seed, losses=((0, 4.0), (20, muon))))
        write(tmp_path / f"a{seed}.jsonl", record_lines("aurora", seed, losses=((0, 4.0), (20, aurora))))
        write(tmp_path / f"w{seed}.jsonl", record_lines("adamw", seed, losses=((0, 4.0), (20, muon + 1))))
    runs, _ = read_folder(tmp_path)
    assert "aurora, 0.0033 below muon (Welch's t-test: p = 0.97, no evidence of a difference)." in compare.verdict(runs)
    decided = compare.verdict([run for run in runs if run.start["optimizer"] != "aurora"])
    assert "muon, 1.0000 below adamw (Welch's t-test: p = 0.00026)." in decided


def compare_command(tiny_track, out, *args):
    process = start_process("scripts/compare.py", "--config", str(tiny_track), "--out", str(out), *args)
    output, err = process.communicate(timeout=240)
    return process.returncode, output, err


def test_compare_runs_skips_what_is_finished_and_goes_on_after_a_failure(tiny_track, tmp_path):
    arguments = ["--optimizers", "muon", "aurora", "--set", "optimizer.muon.lr=1e30", "--set", "train.steps=10"]
    code, out, err = compare_command(tiny_track, tmp_path, *arguments)
    assert code == 1
    assert "failed: muon, seed 0: exit code 5" in err
    assert "| aurora" in out and "| muon" not in out
    assert "step:10/10 val_loss:" in out
    assert (tmp_path / "comparison.md").read_text() in out
    assert (tmp_path / "loss_curves.png").read_bytes().startswith(b"\x89PNG")
    records = set(tmp_path.glob("*.jsonl"))

    code, out, _ = compare_command(tiny_track, tmp_path, *arguments)
    assert code == 1 and "[2/2] aurora, seed 0: finished before" in out
    assert len(set(tmp_path.glob("*.jsonl")) - records) == 1, "the failed run alone is tried again"


def test_finished_run_must_match_arguments_sources_and_world_size(tmp_path):
    write(tmp_path / "a.jsonl", record_lines())
    runs, _ = read_folder(tmp_path)
    start = runs[0].start
    start["argv"] = ["train_gpt.py", "--optimizer", "muon", "--out", "anywhere", "--set", "train.steps=10"]
    start["sources"] = {"train_gpt.py": "code"}
    argv, sources = ["--optimizer", "muon", "--set", "train.steps=10"], {"train_gpt.py": "code"}
    assert compare.finished_run(runs, argv, 1, sources) is runs[0]
    assert compare.finished_run(runs, argv[:2], 1, sources) is None
    assert compare.finished_run(runs, argv, 2, sources) is None
    assert compare.finished_run(runs, argv, 1, {"train_gpt.py": "changed"}) is None
    runs[0].end["status"] = "diverged"
    assert compare.finished_run(runs, argv, 1, sources) is None


def test_compare_names_a_config_that_cannot_be_read(tmp_path):
    code, _, err = compare_command(tmp_path / "gone.toml", tmp_path)
    assert code == 2 and err.count("\n") == 1 and "gone.toml cannot be read" in err


def test_plot_of_the_committed_runs_and_of_what_cannot_be_written(tmp_path):
    process = start_process("scripts/plot.py", "results/quick", "--out", str(tmp_path / "new" / "curves.svg"))
    assert process.communicate(timeout=60)[1] == "" and process.returncode == 0
    assert "<svg" in (tmp_path / "new" / "curves.svg").read_text()
    process = start_process("scripts/plot.py", "results/quick", "--out", str(tmp_path / "curves.nonsense"))
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and err.startswith("error: ") and err.count("\n") == 1


def test_progress_time_left_is_the_mean_of_the_runs_so_far(tiny_track, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "run_one", lambda *args: 5)
    clock = iter(range(0, 10_000, 120))
    monkeypatch.setattr(compare, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr("sys.argv", ["compare.py", "--config", str(tiny_track), "--out", str(tmp_path)])
    assert compare.main() == 5
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[1/4] adamw, seed 0" and lines[3] == "[4/4] aurora, seed 0 (about 2 min left for all runs)"
