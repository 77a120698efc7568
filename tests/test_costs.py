"""What a reader of many records costs: time and memory in proportion to their number."""

import copy
import json
import math
import resource
import subprocess
import sys
import time

import pytest

from aurora.trainer import record
from scripts import compare, runs
from scripts.analysis.report import markdown_report
from scripts.analysis.verdict import MOST_GROUPS, group_runs
from tests.conftest import ROOT, often
from tests.synthetic import write_records

MEASURE = """
import resource, subprocess, sys
process = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(process.returncode, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)
"""


def cost(*command):
    """Exit code, CPU seconds and peak MiB of a command."""
    process = subprocess.run(
        [sys.executable, "-c", MEASURE, sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True
    )
    code, cpu_s, mib = process.stdout.split()
    return int(code), float(cpu_s), float(mib)


@pytest.mark.slow
@pytest.mark.parametrize("num_groups", [1, 50, 5000])
def test_five_thousand_records_take_ten_times_as_long_as_five_hundred(tmp_path, num_groups):
    """At most 60 s and 500 MB each."""
    costs: dict[str, list] = {}
    for count in (500, 5000):
        folder = tmp_path / str(count) / "many"
        write_records(folder, count, min(count, num_groups))
        for name, command in {
            "leaderboard": ("scripts/leaderboard.py", "--results", folder.parent),
            "verify": ("scripts/verify.py", folder),
            "report": ("scripts/compare.py", "--report", folder),
            "plot": ("scripts/plot.py", folder, "--out", tmp_path / "x.png"),
        }.items():
            code, cpu_s, mib = cost(*command)
            assert code in (0, 1) and cpu_s < 60 and mib < 500, (name, count, cpu_s, mib)
            costs.setdefault(name, []).append(cpu_s)
    print(costs)
    for name, (few_s, many_s) in costs.items():
        assert many_s < 15 * few_s, (name, few_s, many_s)


def test_a_board_of_many_rows_compares_the_first_with_the_others(tmp_path):
    write_records(tmp_path, 90, 30)
    found, _ = record.read_folder(tmp_path, condensed=True)
    ((groups),) = group_runs(found).values()
    text = markdown_report(groups)
    assert len(groups) == 30 > MOST_GROUPS
    assert text.count(f"\n| {groups[0].label} - ") + text.count(f" - {groups[0].label} ") >= 29
    assert "corrected for all 435 pairs" in text and len(text) < 30_000
    assert len({group.label for group in groups}) == 30


def test_condensed_runs_show_the_same_tables(tmp_path):
    write_records(tmp_path, 6, 2)
    whole, condensed = (record.read_folder(tmp_path, condensed=condensed)[0] for condensed in (False, True))
    texts = [[markdown_report(groups) for groups in group_runs(found).values()] for found in (whole, condensed)]
    assert texts[0] == texts[1] and "ms/step" in texts[0][0]
    assert len(condensed[0].train_events) == 3 and math.isfinite(condensed[0].mean_ms("step_ms"))


@pytest.mark.parametrize("count", [100, often(1000, False)])
def test_compare_restarts_over_finished_runs_reading_each_once(
    trained, tiny_track, tmp_path, monkeypatch, capsys, count
):
    for seed in range(count):
        start, *events = copy.deepcopy(trained["muon"])  # which other tests use
        argv = ["train_gpt.py", "--config", str(tiny_track), "--optimizer", "muon", "--seed", str(seed), "--out", "x"]
        own = [start | {"seed": seed, "argv": argv}, *events]
        for event in own:
            if "val_loss" in event:
                event["val_loss"] += 1e-6 * seed
        (tmp_path / f"{seed:04}.jsonl").write_text("".join(json.dumps(event) + "\n" for event in own))
    reads = []
    read = record.read_record
    for module in (record, runs):
        monkeypatch.setattr(module, "read_record", lambda path: reads.append(path) or read(path))
    seeds = list(map(str, range(count)))
    argv = [
        "compare.py",
        "--config",
        str(tiny_track),
        "--optimizers",
        "muon",
        "--seeds",
        *seeds,
        "--out",
        str(tmp_path),
    ]
    monkeypatch.setattr(sys, "argv", argv)
    begin_s = time.process_time()  # the machine may be busy
    assert compare.main() == 0
    assert time.process_time() - begin_s < 30
    said = capsys.readouterr().out
    assert said.count("finished before") == count and len(reads) == count


def test_a_folder_is_read_again_only_where_it_changed(tmp_path, monkeypatch):
    paths, reads = write_records(tmp_path, 5, 1), []
    read = runs.read_record
    monkeypatch.setattr(runs, "read_record", lambda path: reads.append(path) or read(path))
    workers = runs.Workers(1, tmp_path)
    assert [run.path for run in workers.records()] == sorted(paths) and len(reads) == 5
    (tmp_path / "new.jsonl").write_text("no record\n")
    paths[0].unlink()
    paths[1].write_text(paths[1].read_text().rpartition('{"event": "end"')[0])
    found = workers.records()
    assert [run.path for run in found] == sorted(paths[1:]) and len(reads) == 7
    assert [run.path for run in found if not run.is_done] == [paths[1]]
    assert workers.records() == found and len(reads) == 7


def test_sources_that_are_equal_are_kept_once(tmp_path):
    assert all('"sources": ' in path.read_text() for path in write_records(tmp_path, 3, 1, whole=True))
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found, _ = record.read_folder(tmp_path)
    texts = [{id(text) for text in run.start["sources"].values()} for run in found]
    assert texts[0] == texts[1] == texts[2]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 100_000
