"""A console that is gone, full or knows few letters stops no program; what a record publishes of a machine."""

import json
import re
import sys

import pytest

from aurora.errors import Exit
from aurora.trainer.identity import describe_machine
from aurora.trainer.public import is_public, plain_line, public_argv
from scripts.verification.export import export_record
from tests.conftest import ROOT, events, start_process, train_here

PROGRAM = """
import sys
from aurora.console import run_script
def main():
    for number in range(3):
        print("caf\\u00e9", "x" * 100_000, flush=True)
    open(sys.argv[1], "w").write("done")
    return 5
sys.exit(run_script(main))
"""


def test_every_program_has_a_steady_console():
    for folder in ("scripts", "data"):
        for path in (ROOT / folder).glob("*.py"):
            text = path.read_text()
            assert "__main__" not in text or "sys.exit(run_script(main))" in text, path
    assert "    steady_streams()\n" in (ROOT / "train_gpt.py").read_text()


@pytest.mark.parametrize("flags", [(), ("-u",)])
def test_a_reader_that_leaves_and_a_console_of_ascii_stop_nothing(tmp_path, flags):
    process = start_process(*flags, "-c", PROGRAM, str(tmp_path / "out"), env={"PYTHONIOENCODING": "ascii:strict"})
    assert process.stdout.read(10) == r"caf\xe9 xx"
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(timeout=20) == 5
    assert (tmp_path / "out").read_text() == "done"


def test_closed_streams_stop_nothing_and_a_full_disk_is_told(tmp_path):
    process = start_process("-c", f"import os; os.close(1); os.close(2); os.execv({sys.executable!r}, "
                            f"['python', '-c', {PROGRAM!r}, {str(tmp_path / 'out')!r}])")  # fmt: skip
    assert process.wait(timeout=20) == 5 and (tmp_path / "out").exists()
    with open("/dev/full", "w") as full:
        process = start_process("-c", PROGRAM.replace("return 5", "return 0"), str(tmp_path / "out"), stdout=full)
        _, said = process.communicate(timeout=20)
    assert process.returncode == Exit.DISK
    assert said == "error: standard output is not whole: No space left on device; make room\n"


@pytest.mark.slow
def test_compare_goes_on_when_its_reader_leaves(tiny_track, tmp_path):
    process = start_process("scripts/compare.py", "--config", str(tiny_track), "--optimizers", "muon", "--out",
                            str(tmp_path))  # fmt: skip
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=100) == 0, process.stderr.read()
    assert (tmp_path / "comparison.md").exists() and events(tmp_path)[-1]["status"] == "done"


def test_secrets_and_folders_of_the_machine_are_not_published(tiny_track, tmp_path, monkeypatch):
    secrets = {
        "SPEEDRUN_API_TOKEN": "t0ps3cret", "NCCL_MY_KEY": "t0ps3cret", "TORCH_HUB_URL": "t0ps3cret",
        "TORCH_HOME": "/home/t0ps3cret", "NCCL_TOPO_FILE": "C:\\\\t0ps3cret", "NCCL_X": "ghp_t0ps3cretabcdefghijklm",
        "CUDA_CACHE_PATH": "~/t0ps3cret", "OMP_X": "t0ps3cret\n{}",
    }  # fmt: skip
    kept = {"NCCL_ALGO": "Ring", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "CUDA_VISIBLE_DEVICES": "0,1",
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "TORCH_NCCL_BLOCKING_WAIT": "1",
            "OMP_PLACES": "{0:4},{4:4}", "SPEEDRUN_JOBS": "2"}  # fmt: skip
    for name, value in (secrets | kept).items():
        monkeypatch.setenv(name, value)
    variables = describe_machine()["variables"]
    assert "t0ps3cret" not in str(variables) and kept.items() <= variables.items()
    assert train_here(tiny_track, tmp_path, "--set", "train.steps=2") == 0
    text = re.sub(r'"(train|val)": "[^"]*"', "", str(events(tmp_path)[0]["argv"]))
    assert str(tmp_path) not in text and str(tiny_track.parent) not in text and "tiny.toml" in text


def test_what_is_published_is_one_line_without_folders():
    assert plain_line('Tesla\n{"event": "run"}\x1b[31m\u2028 T4') == 'Tesla {"event": "run"} [31m T4'
    words = [str(ROOT / "train_gpt.py"), "--config", f"{ROOT}/configs/quick.toml", "--out=/home/me/runs", "--seed", "1"]
    assert public_argv(words) == ["train_gpt.py", "--config", "configs/quick.toml", "--out=runs", "--seed", "1"]
    assert public_argv(["x.py", "--out", "/a/b", "--set", "data.train=/a/*.bin"])[2:] == [
        "b",
        "--set",
        "data.train=/a/*.bin",
    ]
    assert is_public("OMP_NUM_THREADS", "8")


def test_a_device_of_several_lines_adds_no_run_to_an_exported_log(trained, tmp_path):
    start, *rest = trained["muon"]
    env = start["env"] | {"device_name": "GPU\nstep:30/30 val_loss:1.00000 train_time:1.000s step_avg:1.00ms"}
    record = tmp_path / "a.jsonl"
    record.write_text("".join(json.dumps(event) + "\n" for event in (start | {"env": env}, *rest)))
    export_record(record, tmp_path / "log.txt")
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert not [line for line in lines if line.startswith("step:") and "val_loss:1.00000" in line]
