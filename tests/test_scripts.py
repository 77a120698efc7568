"""Reading records, the comparison, its plot."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
from scipy import stats

from aurora.errors import HarnessError
from aurora.trainer.events import RecordError
from aurora.trainer.process import lock_folder
from aurora.trainer.record import Validation, read_folder, read_record
from scripts import compare, plot, runs
from scripts.analysis import report, verdict
from scripts.analysis.statistics import runs_needed
from tests.conftest import ROOT, start_process


def straight(*points, every=2):
    """Validations on straight lines between points (step, loss), near enough to tell when a loss was met."""
    steps, losses = zip(*points, strict=True)
    return [(step, float(np.interp(step, steps, losses))) for step in range(0, steps[-1] + 1, every)]


def record_lines(optimizer="muon", seed=0, losses=((0, 4.0), (10, 3.0), (20, 2.0)), target=2.5, status="done"):
    start = {
        "event": "run",
        "optimizer": optimizer,
        "seed": seed,
        "task_hash": "t",
        "world_size": 1,
        "config": {"eval": {"target": target}, "train": {"steps": losses[-1][0], "batch_tokens": 512}},
        "env": {"device_name": "CPU", "torch": "2"},
        "argv": ["train_gpt.py"],
        "sources": {},
    }
    vals = [{"event": "val", "step": s, "val_loss": loss, "train_time_s": s * 0.5} for s, loss in losses]
    trains = [{"event": "train", "step": 10, "step_ms": 500.0, "optimizer_ms": 20.0 if optimizer == "muon" else 30.0}]
    end = {"event": "end", "status": status, "step": losses[-1][0], "val_loss": losses[-1][1], "train_time_s": 10.0}
    return [json.dumps(event) for event in (start, *vals, *trains, end)]


def write(path, lines, end="\n"):
    path.write_text("\n".join(lines) + end)
    return path


def test_read_record_finds_the_first_validation_at_the_target(tmp_path):
    run = read_record(write(tmp_path / "a.jsonl", record_lines()))
    assert run.is_done and run.first_at_target() == Validation(20, 2.0, 10.0)
    assert run.mean_ms("optimizer_ms") == 20.0
    assert read_record(write(tmp_path / "b.jsonl", record_lines(target=1.0))).first_at_target() is None


def test_read_record_drops_a_torn_line_and_knows_the_run_is_incomplete(tmp_path):
    lines = record_lines()
    run = read_record(write(tmp_path / "a.jsonl", [*lines[:3], lines[3][:20]], end=""))
    assert not run.is_done and [validation.step for validation in run.validations] == [0, 10]


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
    write(tmp_path / "m0.jsonl", record_lines(losses=straight((0, 4.0), (100, 3.0), (200, 2.0))))
    write(tmp_path / "m1.jsonl", record_lines(seed=1, losses=straight((0, 4.0), (100, 3.0), (200, 2.6))))
    write(tmp_path / "a0.jsonl", record_lines("aurora", losses=straight((0, 4.0), (100, 2.4), (200, 1.9))))
    groups = groups_of(tmp_path)
    aurora, muon = map(report.group_cells, groups)
    assert aurora == ("aurora", "200", "1", "1.9000", "-", "-", "-", "1/1", "93.8", "46.9", "500.0", "30.0")
    assert muon == ("muon", "200", "2", "2.3000", "0.4243", "-", "-", "1/2", "> 175.0", "> 87.5", "500.0", "20.0")
    text = report.markdown_report(groups)
    assert "Lowest validation loss after 200 steps: aurora, 0.4000 below muon." in text
    assert "First at the target: aurora after 93.8 steps." in text and "n = 1 is a lead, not evidence" in text


def test_validations_that_are_far_apart_give_a_bracket_and_no_mean_test_or_ratio(tmp_path):
    for seed in range(3):
        begin, end = (0, 4 + seed / 9), 2.0 + seed / 100
        write(tmp_path / f"muon{seed}.jsonl", record_lines("muon", seed, losses=(begin, (100, 3.0), (200, end))))
        write(tmp_path / f"aurora{seed}.jsonl", record_lines("aurora", seed, losses=(begin, (300, end))))
    groups = groups_of(tmp_path)
    cells = {row[0]: row[8:10] for row in map(report.group_cells, groups)}
    assert cells == {"muon": ("100 to 200", "50 to 100"), "aurora": ("0 to 300", "0 to 150")}
    (pair,) = verdict.compare_pairs(groups)
    assert math.isnan(pair.p) and pair.target_ratio is None and pair.step_ratio
    assert pair.verdict == "not comparable: validations of aurora, muon too far apart around the target"
    text = report.markdown_report(groups)
    assert "too far apart around the target to say" in text and "First at the target" not in text
    plot.plot_groups(groups, tmp_path / "curves.png")
    write(tmp_path / "muon2.jsonl", record_lines("muon", 2, losses=((0, 4.5), (100, 3.0), (200, 2.9))))
    assert {row[0]: row[8] for row in map(report.group_cells, groups_of(tmp_path))}["muon"] == "> 100"
    json.dumps(report.as_json(groups), allow_nan=False)


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
    assert re.fullmatch("not supported: a new comparison would need about [0-9]+ seeds a side", close.verdict)
    clear = pairs["muon", "adamw"]
    assert clear.p == pytest.approx(0.00026, abs=1e-5) and 2 * clear.p <= clear.p_holm <= 3 * clear.p
    assert clear.verdict == "supported: muon is lower"
    assert clear.measure == "loss at step 20" and clear.step_ratio[0] == 1.0 and clear.target_ratio is None


def test_verdicts_follow_holm_and_advise_a_fresh_comparison_at_its_level(tmp_path):
    """Each of two neighbours differs at p = 0.03: alone that is significant, among three pairs it is not."""
    low = [2.0, 2.01, 2.02]
    write_seeds(tmp_path, muon=low, aurora=[x + 0.027 for x in low], adamw=[x + 0.054 for x in low])
    pairs = {(pair.first.label, pair.second.label): pair for pair in verdict.compare_pairs(groups_of(tmp_path))}
    close = pairs["muon", "aurora"], pairs["aurora", "adamw"]
    assert [pair.p for pair in close] == pytest.approx([0.03, 0.03], abs=1e-3)
    assert all(pair.p_holm > 0.05 and pair.verdict.startswith("not supported") for pair in close)
    first_of_the_two = min(close, key=lambda pair: pair.p)
    assert f"need about {runs_needed(0.027, 0.01, 0.025)} seeds a side" in first_of_the_two.verdict
    assert pairs["muon", "adamw"].verdict == "supported: muon is lower"


def test_advice_is_for_holms_level_of_each_pair_also_where_the_adjusted_p_is_capped(tmp_path):
    low = [2.0, 2.01, 2.02]
    write_seeds(tmp_path, muon=low, aurora=[x + 0.004 for x in low], adamw=[x + 0.010 for x in low])
    pairs = sorted(verdict.compare_pairs(groups_of(tmp_path)), key=lambda pair: pair.p)
    for pair, difference, level in zip(pairs, (0.010, 0.006, 0.004), (0.05 / 3, 0.05 / 2, 0.05), strict=True):
        assert f"need about {runs_needed(difference, 0.01, level)} seeds a side" in pair.verdict


def write_schedules(folder, **losses_of):
    """Runs whose name ends with their number of steps: losses at the end of each seed."""
    for name, losses in losses_of.items():
        optimizer, steps = name.split("_")
        for seed, loss in enumerate(losses):
            validations = straight((0, 4.0 + seed / 100), (int(steps), loss))
            write(folder / f"{name}-{seed}.jsonl", record_lines(optimizer, seed, losses=validations))


def test_other_schedules_are_compared_by_steps_to_the_target_and_never_by_loss(tmp_path):
    """Muon is lower than adamw at every common step and at the end; what counts is when each meets the target."""
    write_schedules(tmp_path, muon_200=[2.0, 2.1, 1.9], aurora_200=[1.8, 1.7, 1.9], adamw_500=[2.3, 2.35, 2.25])
    pairs = {(pair.first.label, pair.second.label): pair for pair in verdict.compare_pairs(groups_of(tmp_path))}
    assert pairs["aurora", "muon"].measure == "loss at step 200"
    across = pairs["muon", "adamw"]
    crossings = [[hit.step for hit in group.crossings()] for group in (across.first, across.second)]
    assert across.measure == "steps to target"
    assert across.p == pytest.approx(stats.ttest_ind(*crossings, equal_var=False).pvalue, abs=1e-12)
    assert across.verdict == "supported: muon arrives before adamw"
    assert across.difference == pytest.approx(sum(crossings[0]) / 3 - sum(crossings[1]) / 3)
    # 0.5 s a step in all of them, so the ratio is that of the steps: each pair of one seed.
    ratios = [a / b for a, b in zip(*crossings, strict=True)]
    assert across.target_ratio[0] == pytest.approx(stats.gmean(ratios))
    text = report.markdown_report(groups_of(tmp_path))
    assert "Schedules of 200, 500 steps" in text and "Lowest validation loss after 200 steps: aurora" in text
    assert "after 500 steps" not in text


def test_across_schedules_runs_that_never_arrive_are_ranked_last_and_none_is_dropped(tmp_path):
    write_schedules(tmp_path, muon_200=[2.0, 2.1, 1.9, 2.05, 2.15], adamw_500=[2.6, 2.45, 2.7, 2.8, 2.9])
    (pair,) = verdict.compare_pairs(groups_of(tmp_path))
    assert pair.share == 1.0 and pair.p == pytest.approx(2 / math.comb(10, 5))
    assert pair.verdict == "supported: muon arrives before adamw" and math.isnan(pair.difference)
    assert "earlier in 100% of pairs of runs" in report.markdown_report(groups_of(tmp_path))
    for seed in (3, 4):
        (tmp_path / f"muon_200-{seed}.jsonl").unlink()
    (pair,) = verdict.compare_pairs(groups_of(tmp_path))
    assert pair.p == pytest.approx(2 / math.comb(8, 3)) and pair.verdict.startswith("supported")
    for seed in (3, 4):
        (tmp_path / f"adamw_500-{seed}.jsonl").unlink()
    (pair,) = verdict.compare_pairs(groups_of(tmp_path))
    assert pair.verdict == "not supported: a new comparison would need at least 4 seeds a side"
    write_schedules(tmp_path, muon_200=[2.6, 2.7, 2.8], adamw_500=[2.6, 2.7, 2.8])
    assert "no run of either met the target" in verdict.compare_pairs(groups_of(tmp_path))[0].verdict


def test_one_run_a_side_of_unequal_schedules_of_which_one_never_arrives_has_no_test(tmp_path):
    write_schedules(tmp_path, muon_200=[2.0], adamw_500=[2.6])
    (pair,) = verdict.compare_pairs(groups_of(tmp_path))
    assert pair.verdict.startswith("not comparable") and "no test with fewer than 3" in pair.verdict
    assert "| adamw" in report.markdown_report(groups_of(tmp_path))


def test_runs_of_one_optimizer_with_several_schedules_are_groups_of_their_own(tmp_path):
    write_schedules(tmp_path, muon_200=[2.0, 2.1, 1.9], muon_300=[1.9, 1.95])
    groups = groups_of(tmp_path)
    assert [(group.label, len(group.runs)) for group in groups] == [("muon steps=200", 3), ("muon steps=300", 2)]
    lines = [json.loads(line) for line in (tmp_path / "muon_200-0.jsonl").read_text().splitlines()]
    lines[0]["config"]["schedule"] = {"cooldown_frac": 0.1}
    write(tmp_path / "muon_200-0.jsonl", map(json.dumps, lines))
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
    assert "Times are not comparable" in report.markdown_report(groups_of(tmp_path))


def test_seconds_of_a_resumed_run_are_not_compared(tmp_path):
    write_seeds(tmp_path, muon=[2.0, 2.1, 1.9], aurora=[1.0, 1.1, 1.2])
    lines = [json.loads(line) for line in (tmp_path / "muon1.jsonl").read_text().splitlines()]
    lines[-1]["segments"] = 2
    write(tmp_path / "muon1.jsonl", map(json.dumps, lines))
    assert verdict.compare_pairs(groups_of(tmp_path))[0].step_ratio is None
    assert "seconds are not comparable: muon seed 1" in report.markdown_report(groups_of(tmp_path))


def test_times_of_unlike_folders_are_never_compared(tmp_path):
    write_seeds(tmp_path, muon=[2.0, 2.1, 1.9], aurora=[1.0, 1.1, 1.2])
    (tmp_path / "later").mkdir()
    for path in tmp_path.glob("muon*.jsonl"):
        path.rename(tmp_path / "later" / path.name)
    (pair,) = verdict.compare_pairs(groups_of(tmp_path))
    assert pair.step_ratio is None and pair.target_ratio is None and pair.verdict.startswith("supported")
    assert "more than one machine, stack or folder" in report.markdown_report(groups_of(tmp_path))


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
    json.dumps(report.as_json(groups), allow_nan=False)
    assert report.markdown_report(groups)


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


def test_one_name_with_two_codes_is_two_optimizers(tmp_path):
    for seed in range(4):
        start, *rest = map(json.loads, record_lines("Opt", seed))
        start["config"] |= {"rule": "mine:Opt", "parameters": "matrices"}
        sources = {"quick.toml": "", "external/mine.py": f"step = {seed // 2}"}
        start |= {"rule": {"class": "mine.Opt", "packages": {"mine": ""}}, "sources": sources}
        write(tmp_path / f"{seed}.jsonl", map(json.dumps, [start, *rest]))
    labels = [(group.label.partition("=")[0], len(group.runs)) for group in groups_of(tmp_path)]
    assert labels == [("Opt code", 2), ("Opt code", 2)]


def test_modifiers_are_told_also_where_all_runs_of_an_optimizer_have_them(tmp_path):
    for optimizer, own in {"muon": {"projection_init": 0.5, "hyperball": True}, "aurora": {"hyperball": False}}.items():
        start, *rest = map(json.loads, record_lines(optimizer))
        write(tmp_path / f"{optimizer}.jsonl", map(json.dumps, [start | {"hparams": {"lr": 0.1} | own}, *rest]))
    assert sorted(group.label for group in groups_of(tmp_path)) == ["aurora", "muon hyperball=True projection_init=0.5"]


def test_labels_name_keys_that_go_together_once_and_only_what_tells_groups_of_one_rule_apart(tmp_path):
    for optimizer, rates in {"muon": (0.01, 0.02), "aurora": (0.04,)}.items():
        for rate in rates:
            start, *rest = record_lines(optimizer)
            hparams = {"embed_lr": rate, "head_lr": rate, "vector_lr": rate, "momentum": 0.9}
            write(tmp_path / f"{optimizer}{rate}.jsonl", [json.dumps(json.loads(start) | {"hparams": hparams}), *rest])
    labels = sorted(group.label for group in groups_of(tmp_path))
    assert labels == ["aurora", "muon embed_lr=head_lr=vector_lr=0.01", "muon embed_lr=head_lr=vector_lr=0.02"]


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


def test_report_of_the_committed_runs_as_json(monkeypatch, capsys):
    assert run_compare(monkeypatch, "--report", ROOT / "results" / "quick", "--json") == 0
    said = capsys.readouterr()
    (task,) = json.loads(said.out)["tasks"].values()
    assert {group["optimizer"] for group in task["groups"]} == {"adamw", "muon", "unormuon", "aurora"} and not said.err
    assert run_compare(monkeypatch, "--report", ROOT / "configs") == 2
    assert "no record in" in capsys.readouterr().err


def test_compare_runs_skips_what_is_finished_and_goes_on_after_a_failure(
    tiny_track, launch, tmp_path, monkeypatch, capsys
):
    def run_one(self, argv, folder, nproc, progress, *rest):  # in a process that need not import torch first
        outcome = launch(*argv, "--out", folder)
        progress.write(outcome.out[0])
        return outcome.codes[0]

    monkeypatch.setattr(runs.Workers, "run_one", run_one)
    arguments = ["--optimizers", "muon", "aurora", "--set", "optimizer.muon.lr=1e12", "--set", "train.steps=10"]
    assert run_compare(monkeypatch, "--config", tiny_track, "--out", tmp_path, *arguments) == 1
    out, err = capsys.readouterr()
    assert "failed: muon, seed 0: exit code 5" in err
    assert "| aurora" in out and "muon: without a final loss: seed 0 (diverged)" in out
    assert "step:10/10 val_loss:" in out
    assert "aurora" in (tmp_path / "report.html").read_text()
    written = (tmp_path / "comparison.md").read_text()
    assert next(line for line in out.splitlines() if line.startswith("| aurora")) in written
    assert (tmp_path / "loss_curves.png").read_bytes().startswith(b"\x89PNG")

    started = []
    monkeypatch.setattr(runs.Workers, "run_one", lambda self, argv, *args: started.append(argv) or 5)
    code = run_compare(monkeypatch, "--config", tiny_track, "--out", tmp_path, *arguments)
    assert code == 1 and "[2/2] aurora, seed 0: finished before" in capsys.readouterr().out
    assert [argv[3] for argv in started] == ["muon"], "the failed run alone is tried again"


@pytest.mark.slow
def test_jobs_run_side_by_side_on_cores_of_their_own(tiny_track, tmp_path):
    arguments = ["--config", tiny_track, "--out", tmp_path, "--optimizers", "muon", "--seeds", "0", "1", "--jobs", "2"]
    process = start_process("scripts/compare.py", *map(str, arguments), "--set", "train.steps=10")
    out, err = process.communicate(timeout=240)
    assert (process.returncode, err) == (0, "") and "    [2/2] muon, seed 1: val_loss" in out
    assert f"record {os.path.relpath(tmp_path, ROOT)}/tiny-muon-s1-" in out, "where it lies in the end"
    runs, _ = read_folder(tmp_path)
    assert len(runs) == len(list(tmp_path.glob("*.jsonl"))) == 2
    for run in runs:
        assert run.start["env"]["variables"]["SPEEDRUN_JOBS"] == "2"
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        assert run.start["env"]["torch_threads"] == max(1, cores // 2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--seeds", "0", "1", "0"], "--seeds has 0 more than once"),
        (["--optimizers", "muon", "muon"], "--optimizers has muon more than once"),
        (["--nproc", "0"], "--nproc must be at least 1, got 0"),
        (["--jobs", "2", "--nproc", "2"], "--jobs must be at least 1, and 1 with --nproc above 1"),
    ],
)
def test_usage_that_makes_no_sense_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        compare.parse_args(arguments)
    assert error.value.code == 2 and message in capsys.readouterr().err


def run_compare(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["compare.py", *map(str, arguments)])
    return compare.main()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--optimizers", "muon", "foo"], "unknown optimizer 'foo'"),
        (["--set", "train.stepz=3"], "unknown key 'stepz'"),
        (["--optimizers", "muon", "--grid", "optimizer.lr=0.1,high"], "optimizer.muon.lr must be a finite number"),
        (["--optimizers", "muon", "--grid", "optimizer.lrr=0.1"], "optimizer.muon has an unknown key 'lrr'"),
        (["--optimizers", "adamw", "muon", "--set", "optimizer.muon.lr=-1"], "lr must be at least 0, got -1.0"),
        (["--nproc", "7"], "7 ranks do not divide the 16 sequences"),
        (["--set", "optimizer.muon.warmup_steps=900"], "leave no step for it in train.steps = 30"),
    ],
)
def test_what_no_run_could_start_with_is_said_once_before_the_first(
    tiny_track, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.setattr(runs.Workers, "run_one", lambda *args: pytest.fail("a run was started"))
    assert run_compare(monkeypatch, "--config", tiny_track, "--out", tmp_path, *arguments) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and not said.out


ARGV = ["--config", "a.toml", "--optimizer", "muon", "--seed", "0"]
SOURCES = {"train_gpt.py": "code", "aurora/optim/polar.py": "of it", "a.toml": "track"}


@pytest.fixture
def checkout(tmp_path_factory, monkeypatch):
    """A folder with SOURCES in the place of the project's, and a file that no run has imported."""
    folder = tmp_path_factory.mktemp("checkout")
    for name, text in (SOURCES | {"aurora/optim/new.py": "new"}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.setattr(runs, "ROOT", folder)
    return folder


def write_stopped(folder, name="old", status="interrupted", sources=SOURCES, has_checkpoint=True):
    """A run with ARGV that did not finish."""
    lines = [json.loads(line) for line in record_lines(status=status)]
    lines[0] |= {"argv": ["train_gpt.py", *ARGV, "--out", "somewhere"], "sources": sources}
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / f"{name}.jsonl", map(json.dumps, lines))
    if has_checkpoint:
        (folder / f"{name}.checkpoints" / "step-000010").mkdir(parents=True)


def train(jobs, out):
    return runs.Workers(jobs, out).train(ARGV, 1, sys.stdout, "")


@pytest.mark.parametrize(
    "name, text, is_other",
    [
        ("train_gpt.py", "edited", True),
        ("aurora/optim/polar.py", "edited", True),
        ("aurora/optim/polar.py", None, True),
        ("a.toml", "edited", True),
        ("aurora/optim/new.py", "edited", False),
        ("aurora/optim/other.py", "new", False),
    ],
)
def test_a_run_is_current_as_long_as_the_files_it_imported_and_its_track_are_unchanged(
    checkout, tmp_path, name, text, is_other
):
    write_stopped(tmp_path, status="done")
    ((run,), _) = read_folder(tmp_path)
    assert runs.is_current(run, checkout / "a.toml") and runs.finished_run([run], ARGV, 1) is run
    (checkout / name).unlink(missing_ok=True)
    if text:
        (checkout / name).write_text(text)
    assert runs.is_current(run, checkout / "a.toml") != is_other
    assert runs.finished_run([run], ARGV, 1) is (None if is_other else run)
    assert runs.is_current(run) != (is_other and name != "a.toml"), "the code alone"


def test_a_run_without_code_or_with_sources_that_are_no_files_is_not_current(checkout, tmp_path):
    for sources in ({}, {"a.toml": "track"}, SOURCES | {"\0.py": ""}, SOURCES | {"aurora.py": 1}):
        write_stopped(tmp_path, sources=sources)
        assert not runs.is_current(read_record(tmp_path / "old.jsonl"), checkout / "a.toml")
        shutil.rmtree(tmp_path / "old.checkpoints")


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failure_after_a_stop_is_a_failure(checkout, tmp_path, monkeypatch, jobs):
    """Its record is the old one, as data are missing or memory ran out before there was a new one."""
    write_stopped(tmp_path, has_checkpoint=False)
    monkeypatch.setattr(runs.Workers, "run_one", lambda *args, **how: 3)
    assert train(jobs, tmp_path) == runs.Outcome(None, 3)
    monkeypatch.setattr(runs.Workers, "run_one", lambda self, argv, folder, *args: write_stopped(folder, "new") or 1)
    outcome = train(jobs, tmp_path)
    assert outcome.exit_code == 75 and outcome.run.path == tmp_path / "new.jsonl", "torchrun hides 75"


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_stopped_run_goes_on_from_its_checkpoint(checkout, tmp_path, monkeypatch, jobs):
    write_stopped(tmp_path)
    write_stopped(tmp_path, "other", sources={"train_gpt.py": "changed"})
    write_stopped(tmp_path, "without", has_checkpoint=False)

    def resume(self, argv, folder, *args, go_on):
        assert argv == ARGV and go_on and (folder / "old.checkpoints" / "step-000010").is_dir()
        write_stopped(folder, status="done", has_checkpoint=False)
        return 0

    monkeypatch.setattr(runs.Workers, "run_one", resume)
    assert train(jobs, tmp_path).run.path == tmp_path / "old.jsonl"
    assert (tmp_path / "old.checkpoints").is_dir() and not list(tmp_path.glob(".run-*"))


def test_a_run_whose_process_was_killed_in_its_own_folder_is_taken_from_there(checkout, tmp_path, monkeypatch):
    write_stopped(tmp_path / ".run-before")
    monkeypatch.setattr(runs.Workers, "run_one", lambda self, argv, folder, *args, go_on: 0)
    assert train(1, tmp_path).run.path == tmp_path / "old.jsonl"
    assert (tmp_path / "old.checkpoints").is_dir() and not list(tmp_path.glob(".run-*"))


def test_runs_of_other_folders_below_out_are_not_moved(checkout, tmp_path, monkeypatch):
    write_stopped(tmp_path / "mine")
    write_stopped(tmp_path / "mine", "beside", sources={})
    started = []
    monkeypatch.setattr(runs.Workers, "run_one", lambda self, argv, *args, go_on=False: started.append(go_on) or 0)
    train(1, tmp_path)
    assert started == [False] and len(list((tmp_path / "mine").glob("*.jsonl"))) == 2


def test_a_run_that_goes_on_in_another_process_is_left_alone(checkout, tmp_path, monkeypatch):
    """As after a kill of compare.py alone: its runs live on."""
    write_stopped(tmp_path / ".run-before")
    monkeypatch.setattr(runs.Workers, "run_one", lambda *args, **how: pytest.fail("it was started a second time"))
    with lock_folder(tmp_path / ".run-before"), pytest.raises(HarnessError, match="is in use by process"):
        train(1, tmp_path)
    assert (tmp_path / ".run-before" / "old.jsonl").is_file() and len(list(tmp_path.glob(".run-*"))) == 1


def test_a_run_that_cannot_go_on_starts_anew(checkout, tmp_path, monkeypatch, capsys):
    """As with checkpoints that are all damaged."""
    write_stopped(tmp_path)

    def start(self, argv, folder, *args, go_on=False):
        if go_on:
            return 4
        assert not list(folder.iterdir())
        write_stopped(folder, "new", status="done", has_checkpoint=False)
        return 0

    monkeypatch.setattr(runs.Workers, "run_one", start)
    outcome = train(1, tmp_path)
    assert outcome.exit_code == 0 and outcome.run.path == tmp_path / "new.jsonl"
    assert (tmp_path / "old.checkpoints").is_dir() and "starts anew" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change", [{"status": "done"}, {"status": "diverged"}, {"sources": {}}, {"has_checkpoint": False}]
)
def test_any_other_run_starts_anew(checkout, tmp_path, monkeypatch, change):
    write_stopped(tmp_path, **change)
    started = []
    monkeypatch.setattr(runs.Workers, "run_one", lambda self, argv, *args: started.append(argv) or 0)
    train(1, tmp_path)
    assert started == [ARGV]


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_where_its_checkpoint_is(tiny_track, launch, tmp_path, capsys):
    argv = ["--config", str(tiny_track), "--optimizer", "muon", "--seed", "0"]
    argv += ["--set", "train.steps=20", "--set", "train.checkpoint_every=10"]
    launch(*argv, "--out", tmp_path)
    (path,) = tmp_path.glob("*.jsonl")
    lines = path.read_text().splitlines()
    write(path, [line for line in lines if json.loads(line).get("step", 0) <= 10])
    shutil.rmtree(path.with_suffix(".checkpoints") / "step-000020")
    again = runs.Workers(1, tmp_path).train(argv, 1, sys.stdout, "")
    assert again.exit_code == 0 and "resume: from step 10" in capsys.readouterr().out
    assert again.run.path == path and again.run.is_done and again.run.end["segments"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_for_compare_alone_stops_its_runs_with_a_checkpoint(tiny_track, tmp_path, signum):
    command = [sys.executable, ROOT / "scripts" / "compare.py", "--config", tiny_track, "--optimizers", "muon", "adamw"]
    command += ["--set", "train.steps=100000", "--set", "data.allow_epochs=true", "--set", "eval.every=1000"]
    command += ["--set", "eval.late_frac=0", "--jobs", "2", "--out", tmp_path]
    compare = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    begun = 0
    for line in compare.stdout:
        begun += "step:0/" in line and "val_loss" in line
        if begun == 2:
            break
    compare.send_signal(signum)
    _, err = compare.communicate(timeout=60)
    assert compare.returncode == 75 and "the same command goes on" in err
    ends = [read_record(path).end for path in tmp_path.glob("*.jsonl")]
    assert [end["status"] for end in ends] == ["interrupted"] * 2
    assert len(list(tmp_path.glob("*.checkpoints/step-*"))) == 2


def test_an_error_of_the_plot_does_not_cost_the_table(tiny_track, tmp_path, monkeypatch, capsys):
    done = read_record(write(tmp_path / "muon.jsonl", record_lines()))
    monkeypatch.setattr(runs.Workers, "train", lambda *args: runs.Outcome(done, 0))

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(plot, "plot_loss_curves", fail)
    out = tmp_path / "out"
    assert run_compare(monkeypatch, "--config", tiny_track, "--out", out, "--optimizers", "muon") == 0
    said = capsys.readouterr()
    assert "| muon" in said.out and "no curves: no space left" in said.err


def test_finished_run_must_match_arguments_and_world_size(checkout, tmp_path):
    write_stopped(tmp_path, status="done")
    found, _ = read_folder(tmp_path)
    assert compare.finished_run(found, ARGV, 1) is found[0]
    assert compare.finished_run(found, [*ARGV, "--set", "train.steps=10"], 1) is None
    assert compare.finished_run(found, ARGV[:4], 1) is None
    assert compare.finished_run(found, ARGV, 2) is None
    found[0].end["status"] = "diverged"
    assert compare.finished_run(found, ARGV, 1) is None


def test_compare_names_a_config_that_cannot_be_read(tmp_path, monkeypatch, capsys):
    assert run_compare(monkeypatch, "--config", tmp_path / "gone.toml", "--out", tmp_path) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "gone.toml cannot be read" in err


def test_plot_of_the_committed_runs_and_of_what_cannot_be_written(tmp_path, monkeypatch, capsys):
    process = start_process("scripts/plot.py", "results/quick", "--out", str(tmp_path / "new" / "curves.svg"))
    assert process.communicate(timeout=60)[1] == "" and process.returncode == 0
    assert "<svg" in (tmp_path / "new" / "curves.svg").read_text()
    monkeypatch.setattr(
        "sys.argv", ["plot.py", str(ROOT / "results/quick"), "--out", str(tmp_path / "curves.nonsense")]
    )
    assert plot.main() == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_every_group_has_a_style_and_as_few_as_can_be_share_one(tmp_path):
    for optimizer in ("adamw", "muon", "unormuon", "aurora"):
        for lr in (0.01, 0.02, 0.04):
            start, *rest = record_lines(optimizer)
            write(tmp_path / f"{optimizer}{lr}.jsonl", [json.dumps(json.loads(start) | {"hparams": {"lr": lr}}), *rest])
    groups = groups_of(tmp_path)
    styles = plot.styles_of(groups)
    assert len(styles) == 12 and len(set(styles)) == 7
    assert len(plot.styles_of([group for group in groups if group.optimizer == "muon"] * 3)) == 9
    plot.plot_groups(groups, tmp_path / "a.svg")


@pytest.mark.parametrize("is_empty", [True, False])
def test_plot_of_nothing_or_without_matplotlib_is_an_error_in_one_line(tmp_path, monkeypatch, capsys, is_empty):
    if not is_empty:
        write(tmp_path / "muon.jsonl", record_lines())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("sys.argv", ["plot.py", str(tmp_path), "--out", str(tmp_path / "a.png")])
    assert plot.main() == 2
    err = capsys.readouterr().err
    assert ("no record in" if is_empty else "pip install -e '.[report]'") in err and err.count("\n") == 1


def test_progress_time_left_is_the_mean_of_the_runs_so_far(tiny_track, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare.Workers, "train", lambda *args: runs.Outcome(None, 5))
    clock = iter(range(0, 10_000, 120))
    monkeypatch.setattr(compare, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr("sys.argv", ["compare.py", "--config", str(tiny_track), "--out", str(tmp_path)])
    assert compare.main() == 5
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[1/4] adamw, seed 0" and lines[3] == "[4/4] aurora, seed 0 (about 2 min left for all runs)"
