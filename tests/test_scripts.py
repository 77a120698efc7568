"""Reading records, the comparison, its plot."""

import json
import math
import os
import types

import pytest
from scipy import stats

from results import verdict
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


def groups_of(folder):
    ((_, groups),) = verdict.group_runs(read_folder(folder)[0]).items()
    return groups


def test_report_orders_by_loss_and_never_averages_over_the_seeds_that_made_it(tmp_path):
    write(tmp_path / "m0.jsonl", record_lines())
    write(tmp_path / "m1.jsonl", record_lines(seed=1, losses=((0, 4.0), (10, 3.0), (20, 2.6))))
    write(tmp_path / "a0.jsonl", record_lines("aurora", losses=((0, 4.0), (10, 2.4), (20, 1.9))))
    groups = groups_of(tmp_path)
    aurora, muon = map(verdict.group_cells, groups)
    assert aurora == ("aurora", "20", "1", "1.9000", "-", "-", "-", "1/1", "9.4", "4.7", "500.0", "30.0")
    assert muon == ("muon", "20", "2", "2.3000", "0.4243", "-", "-", "1/2", "> 17.5", "> 8.8", "500.0", "20.0")
    text = verdict.report(groups)
    assert "Lowest validation loss after 20 steps: aurora, 0.4000 below muon." in text
    assert "First at the target: aurora after 9.4 steps." in text and "n = 1 is a lead, not evidence" in text


def write_seeds(folder, **losses_of):
    for optimizer, losses in losses_of.items():
        for seed, loss in enumerate(losses):
            lines = record_lines(optimizer, seed, losses=((0, 4.0 + seed / 100), (20, loss)))
            write(folder / f"{optimizer}{seed}.jsonl", lines)


def test_verdicts_say_what_the_seeds_can_tell_apart(tmp_path):
    write_seeds(tmp_path, muon=[2.0, 2.1, 1.9], aurora=[1.99, 2.08, 1.92], adamw=[3.0, 3.1, 2.9])
    pairs = {(pair.first.label, pair.second.label): pair for pair in verdict.compare_pairs(groups_of(tmp_path))}
    close = pairs["aurora", "muon"]
    assert close.difference == pytest.approx(-1 / 300) and close.p == pytest.approx(0.966, abs=1e-3)
    assert close.verdict.startswith("not supported: about ")
    clear = pairs["muon", "adamw"]
    assert clear.p == pytest.approx(0.00026, abs=1e-5) and 2 * clear.p <= clear.p_holm <= 3 * clear.p
    assert clear.verdict == "supported: muon is lower"
    assert clear.measure == "loss at step 20" and clear.step_ratio[0] == 1.0 and clear.target_ratio is None


def write_schedules(folder, **losses_of):
    """Runs whose name ends with their number of steps: losses at the end of each seed."""
    for name, losses in losses_of.items():
        optimizer, steps = name.split("_")
        for seed, loss in enumerate(losses):
            looks = ((0, 4.0 + seed / 100), (int(steps), loss))
            start, *rest = map(json.loads, record_lines(optimizer, seed, losses=looks))
            start["config"]["train"]["steps"] = rest[-1]["step"] = int(steps)
            write(folder / f"{name}-{seed}.jsonl", map(json.dumps, (start, *rest)))


def test_other_schedules_are_compared_by_steps_to_the_target_and_never_by_loss(tmp_path):
    """Muon is lower than adamw at every common step and at the end; what counts is when each meets the target."""
    write_schedules(tmp_path, muon_20=[2.0, 2.1, 1.9], aurora_20=[1.8, 1.7, 1.9], adamw_50=[2.3, 2.35, 2.25])
    pairs = {(pair.first.label, pair.second.label): pair for pair in verdict.compare_pairs(groups_of(tmp_path))}
    assert pairs["aurora", "muon"].measure == "loss at step 20"
    across = pairs["muon", "adamw"]
    crossings = [[hit.step for hit in group.crossings()] for group in (across.first, across.second)]
    assert across.measure == "steps to target"
    assert across.p == pytest.approx(stats.ttest_ind(*crossings, equal_var=False).pvalue, abs=1e-12)
    assert across.verdict == "supported: muon arrives before adamw"
    assert across.difference == pytest.approx(sum(crossings[0]) / 3 - sum(crossings[1]) / 3)
    # 0.5 s a step in all of them, so the ratio is that of the steps: each pair of one seed.
    ratios = [a / b for a, b in zip(*crossings, strict=True)]
    assert across.target_ratio[0] == pytest.approx(stats.gmean(ratios))
    text = verdict.report(groups_of(tmp_path))
    assert "Schedules of 20, 50 steps" in text and "Lowest validation loss after 20 steps: aurora" in text
    assert "after 50 steps" not in text


def test_across_schedules_runs_that_never_arrive_are_ranked_last_and_none_is_dropped(tmp_path):
    write_schedules(tmp_path, muon_20=[2.0, 2.1, 1.9, 2.05, 2.15], adamw_50=[2.6, 2.45, 2.7, 2.8, 2.9])
    (pair,) = verdict.compare_pairs(groups_of(tmp_path))
    assert pair.share == 1.0 and pair.p == pytest.approx(2 / math.comb(10, 5))
    assert pair.verdict == "supported: muon arrives before adamw" and math.isnan(pair.difference)
    assert "earlier in 100% of pairs of runs" in verdict.report(groups_of(tmp_path))
    for seed in (3, 4):
        (tmp_path / f"muon_20-{seed}.jsonl").unlink()
    (pair,) = verdict.compare_pairs(groups_of(tmp_path))
    assert pair.p == pytest.approx(2 / math.comb(8, 3)) and pair.verdict.startswith("supported")
    for seed in (3, 4):
        (tmp_path / f"adamw_50-{seed}.jsonl").unlink()
    (pair,) = verdict.compare_pairs(groups_of(tmp_path))
    assert pair.verdict == "not supported: ranks need at least 4 runs a side"
    write_schedules(tmp_path, muon_20=[2.6, 2.7, 2.8], adamw_50=[2.6, 2.7, 2.8])
    assert "no run of either met the target" in verdict.compare_pairs(groups_of(tmp_path))[0].verdict


def test_runs_of_one_optimizer_with_several_schedules_are_groups_of_their_own(tmp_path):
    write_schedules(tmp_path, muon_20=[2.0, 2.1, 1.9], muon_30=[1.9, 1.95])
    groups = groups_of(tmp_path)
    assert [(group.label, len(group.runs)) for group in groups] == [("muon steps=20", 3), ("muon steps=30", 2)]
    lines = [json.loads(line) for line in (tmp_path / "muon_20-0.jsonl").read_text().splitlines()]
    lines[0]["config"]["schedule"] = {"cooldown_frac": 0.1}
    write(tmp_path / "muon_20-0.jsonl", map(json.dumps, lines))
    assert len(groups_of(tmp_path)) == 3, "another cooldown is another setting"


@pytest.mark.parametrize(
    "env",
    [
        *({"torch_threads": 1}, {"cpu_count": 64}, {"usable_cpus": 1}, {"device_name": "GPU"}, {"torch": "3"}),
        {"variables": {"SPEEDRUN_JOBS": "2"}},
    ],
)
def test_times_of_unlike_machines_are_never_compared(tmp_path, env):
    write_seeds(tmp_path, muon=[2.0, 2.1, 1.9], aurora=[1.0, 1.1, 1.2])
    assert verdict.compare_pairs(groups_of(tmp_path))[0].step_ratio
    lines = [json.loads(line) for line in (tmp_path / "muon1.jsonl").read_text().splitlines()]
    lines[0]["env"] |= env
    write(tmp_path / "muon1.jsonl", map(json.dumps, lines))
    (pair,) = verdict.compare_pairs(groups_of(tmp_path))
    assert pair.step_ratio is None and pair.target_ratio is None and pair.verdict.startswith("supported")
    assert "Times are not comparable" in verdict.report(groups_of(tmp_path))


def test_seconds_of_a_resumed_run_are_not_compared(tmp_path):
    write_seeds(tmp_path, muon=[2.0, 2.1, 1.9], aurora=[1.0, 1.1, 1.2])
    lines = [json.loads(line) for line in (tmp_path / "muon1.jsonl").read_text().splitlines()]
    lines[-1]["segments"] = 2
    write(tmp_path / "muon1.jsonl", map(json.dumps, lines))
    assert verdict.compare_pairs(groups_of(tmp_path))[0].step_ratio is None
    assert "seconds are not comparable: muon seed 1" in verdict.report(groups_of(tmp_path))


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda runs: runs.pop(), "muon: 2 runs, no test with fewer than 3"),
        (lambda runs: runs[2].start.update(seed=1), "muon: seeds more than once: 1"),
        (lambda runs: setattr(runs[2], "validations", runs[1].validations), "muon: 1 run with the losses of another"),
        (lambda runs: runs[2].end.update(status="diverged"), "muon: without a final loss: seed 2 (diverged)"),
        (lambda runs: setattr(runs[2], "end", None), "muon: without a final loss: seed 2 (cut short)"),
        (lambda runs: runs[2].validations.pop(0), "muon: not validated at the same steps"),
    ],
)
def test_what_forbids_a_test_is_named_and_nothing_is_dropped(tmp_path, change, reason):
    write_seeds(tmp_path, aurora=[1.0, 1.1, 1.2], muon=[2.0, 2.1, 1.9])
    runs, _ = read_folder(tmp_path)
    aurora, muon = runs[:3], runs[3:]
    change(muon)
    ((_, groups),) = verdict.group_runs([*aurora, *muon]).items()
    (pair,) = verdict.compare_pairs(groups)
    assert pair.verdict.startswith("not comparable: ") and reason in pair.verdict
    assert sum(len(group.runs) for group in groups) == len(aurora) + len(muon)
    json.dumps(verdict.as_json(groups), allow_nan=False)
    assert verdict.report(groups)


def test_an_attempt_that_was_stopped_and_made_good_counts_once_and_a_diverged_one_stays(tmp_path):
    write_seeds(tmp_path, muon=[2.0, 2.1, 1.9])
    write(tmp_path / "cut.jsonl", record_lines(seed=1)[:-1])
    assert [len(group.runs) for group in groups_of(tmp_path)] == [3]
    write(tmp_path / "diverged.jsonl", record_lines(seed=1, status="diverged"))
    (group,) = groups_of(tmp_path)
    assert len(group.runs) == 4 and "seeds more than once: 1" in group.flaws()


def test_groups_are_labelled_by_the_settings_in_which_they_differ(tmp_path):
    for lr in (0.01, 0.02):
        lines = record_lines()
        start = json.loads(lines[0]) | {"hparams": {"lr": lr, "momentum": 0.95}}
        write(tmp_path / f"{lr}.jsonl", [json.dumps(start), *lines[1:]])
    assert [group.label for group in groups_of(tmp_path)] == ["muon lr=0.01", "muon lr=0.02"]


def test_plan_alternates_optimizers_and_multiplies_grids():
    arguments = ["--optimizers", "muon", "adamw", "--seeds", "0", "1", "--grid", "optimizer.lr=0.1,0.2"]
    plan = compare.plan_runs(compare.parse_args(arguments))
    assert [planned.title for planned in plan[:3]] == [
        "muon, optimizer.lr 0.1, seed 0",
        "adamw, optimizer.lr 0.1, seed 0",
        "muon, optimizer.lr 0.2, seed 0",
    ]
    assert plan[1].argv[-2:] == ["--set", "optimizer.adamw.lr=0.1"] and len(plan) == 8
    one_by_one = compare.plan_runs(compare.parse_args([*arguments, "--no-interleave"]))
    assert [planned.argv[3] for planned in one_by_one] == ["muon"] * 4 + ["adamw"] * 4
    assert compare.grid_values("optimizer.aux_betas=[0.8,0.9],[0.9,0.95]")[1][1] == "[0.9,0.95]"


def test_report_of_the_committed_runs_as_json():
    process = start_process("scripts/compare.py", "--report", "results/quick", "--json")
    output, err = process.communicate(timeout=60)
    (task,) = json.loads(output)["tasks"].values()
    assert process.returncode == 0 and err == ""
    assert {group["optimizer"] for group in task["groups"]} == {"adamw", "muon", "unormuon", "aurora"}
    process = start_process("scripts/compare.py", "--report", "configs")
    assert "no record in configs" in process.communicate(timeout=60)[1] and process.returncode == 2


def compare_command(tiny_track, out, *args):
    process = start_process("scripts/compare.py", "--config", str(tiny_track), "--out", str(out), *args)
    output, err = process.communicate(timeout=240)
    return process.returncode, output, err


def test_compare_runs_skips_what_is_finished_and_goes_on_after_a_failure(tiny_track, tmp_path):
    arguments = ["--optimizers", "muon", "aurora", "--set", "optimizer.muon.lr=1e30", "--set", "train.steps=10"]
    code, out, err = compare_command(tiny_track, tmp_path, *arguments)
    assert code == 1
    assert "failed: muon, seed 0: exit code 5" in err
    assert "| aurora" in out and "muon: without a final loss: seed 0 (diverged)" in out
    assert "step:10/10 val_loss:" in out
    written = (tmp_path / "comparison.md").read_text()
    assert next(line for line in out.splitlines() if line.startswith("| aurora")) in written
    assert (tmp_path / "loss_curves.png").read_bytes().startswith(b"\x89PNG")
    records = set(tmp_path.glob("*.jsonl"))

    code, out, _ = compare_command(tiny_track, tmp_path, *arguments)
    assert code == 1 and "[2/2] aurora, seed 0: finished before" in out
    assert len(set(tmp_path.glob("*.jsonl")) - records) == 1, "the failed run alone is tried again"


def test_jobs_run_side_by_side_on_cores_of_their_own(tiny_track, tmp_path):
    code, out, err = compare_command(
        *(tiny_track, tmp_path, "--optimizers", "muon", "adamw", "--seeds", "0", "1", "--jobs", "2"),
        *("--set", "train.steps=10"),
    )
    assert (code, err) == (0, "") and "    [4/4] adamw, seed 1: val_loss" in out
    runs, _ = read_folder(tmp_path)
    assert len(runs) == len(list(tmp_path.glob("*.jsonl"))) == 4
    for run in runs:
        assert run.start["env"]["variables"]["SPEEDRUN_JOBS"] == "2"
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        assert run.start["env"]["torch_threads"] == max(1, cores // 2)
    code, _, err = compare_command(tiny_track, tmp_path, "--jobs", "2", "--nproc", "2")
    assert code == 2 and "--jobs must be at least 1, and 1 with --nproc above 1" in err


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
    monkeypatch.setattr(compare.Workers, "train", lambda *args: 5)
    clock = iter(range(0, 10_000, 120))
    monkeypatch.setattr(compare, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr("sys.argv", ["compare.py", "--config", str(tiny_track), "--out", str(tmp_path)])
    assert compare.main() == 5
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[1/4] adamw, seed 0" and lines[3] == "[4/4] aurora, seed 0 (about 2 min left for all runs)"
