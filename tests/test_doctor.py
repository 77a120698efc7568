"""The doctor: on this machine, and on machines with one planted fault each, whose line must say so and what to do."""

import json
import resource
import shutil

import pytest

from scripts import doctor
from scripts.diagnosis import probes
from scripts.diagnosis.checks import Machine, graphics, software
from tests.conftest import ROOT, start_process

H200 = "{}, NVIDIA H200, 580.159.04, 143771, {}, {}, 345, 1980"


def lines_of(capsys, track, *arguments):
    code = doctor.main(["--config", str(track), "--optimizer", "muon", "--json", *map(str, arguments)])
    lines = {line["name"]: line for line in json.loads(capsys.readouterr().out)}
    assert code == any(line["status"] == "error" for line in lines.values())
    assert all(line["fix"] for line in lines.values() if line["status"] != "ok")
    return lines


@pytest.fixture
def machine(monkeypatch):
    """Changes what probes find."""

    def change(**found):
        for name, value in found.items():
            monkeypatch.setattr(probes, name, lambda *args, value=value: value)

    return change


def test_a_good_machine_has_no_error_and_every_line_is_there(tiny_track, tmp_path, capsys):
    lines = lines_of(capsys, tiny_track, "--out", tmp_path)
    wanted = {"python", "driver", "torch", "CUDA", "host memory", "open files", "disk of --out", "data", "attention"}
    assert wanted | {"kernels", "FLOP", "time"} <= lines.keys()
    assert {line["status"] for line in lines.values() if line["name"] != "open files"} == {"ok"}
    assert "read and checked" in lines["data"]["found"] and not list(tmp_path.iterdir())


FAULTS = {
    "old torch": ({"stack": probes.Stack(torch="2.8.0+cu126", cuda="12.6")}, "torch", "error", "install 2.9 or newer"),
    "no torch": ({"stack": probes.Stack(error="libcudart.so: cannot open")}, "torch", "error", "pip install"),
    "disk nearly full": ({"disk_free_bytes": 1 << 20}, "disk of --out", "error", "make room"),
    "disk for one checkpoint": ({"disk_free_bytes": 65 << 20}, "disk of --out", "warning", "make room"),
    "no write permission": ({"why_not_writable": "Permission denied"}, "disk of --out", "error", "another --out"),
    "no memory": ({"free_memory_bytes": 1000}, "host memory", "error", "end other programs"),
    "few files": ({"open_files_limit": (512, 4096)}, "open files", "warning", "ulimit -n 4096"),
    "few files for good": ({"open_files_limit": (64, 64)}, "open files", "error", "limits.conf"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_machine_is_named_with_its_fix(tiny_track, tmp_path, capsys, machine, fault):
    found, name, status, fix = FAULTS[fault]
    machine(**found)
    line = lines_of(capsys, tiny_track, "--out", tmp_path)[name]
    assert line["status"] == status and fix in line["fix"]


GPUS = [probes.gpu_of(H200.format(number, 4, 0)) for number in range(2)]
STACK = probes.Stack("", "2.13.0+cu130", "13.0", 91900, "2.28.9", 2)
GPU_FAULTS = {
    "wrong CUDA": ({"driver_cuda": "12.4"}, "CUDA", "error", "update the driver, or install torch for CUDA 12"),
    "torch for CPUs": ({"stack": probes.Stack("", "2.13.0+cpu")}, "CUDA", "error", "install torch for CUDA"),
    "hidden GPUs": ({"stack": STACK._replace(num_gpus=0)}, "CUDA", "error", "CUDA_VISIBLE_DEVICES"),
    "no triton": ({"version_of": ""}, "triton", "warning", "pip install triton"),
    "no NCCL": ({"stack": STACK._replace(nccl=None)}, "NCCL", "error", "run on one GPU"),
    "no P2P": ({"stack": STACK._replace(without_peers=((0, 1), (1, 0)))}, "P2P", "warning", "nvidia-smi topo"),
    "busy GPU": ({"gpus": [GPUS[0], probes.gpu_of(H200.format(1, 70000, 99))]}, "GPU 1", "warning", "nvidia-smi"),
}


def gpu_lines(**found):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ({"gpus": GPUS, "stack": STACK, "driver_cuda": "13.0", "version_of": "3.7"} | found).items():
            patch.setattr(probes, name, lambda *args, value=value: value)
        here = Machine(probes.gpus(), probes.stack())
        return {line.name: line for line in [*software(here), *graphics(here)]}


@pytest.mark.parametrize("fault", GPU_FAULTS)
def test_a_fault_of_gpus_is_named_with_its_fix(fault):
    assert {line.status for line in gpu_lines().values()} == {"ok"}
    found, name, status, fix = GPU_FAULTS[fault]
    line = gpu_lines(**found)[name]
    assert line.status == status and fix in line.fix


def test_two_gpus_need_shared_memory(tiny_track, tmp_path, capsys, machine):
    machine(gpus=GPUS, stack=STACK, driver_cuda="13.0", version_of="3.7", shared_memory_bytes=64 << 20)
    line = lines_of(capsys, tiny_track, "--out", tmp_path)["/dev/shm"]
    assert line["status"] == "error" and "--shm-size=8g" in line["fix"]


def test_data_that_is_missing_or_broken_is_named_with_its_fix(tiny_track, tmp_path, capsys):
    for name in ("tiny.toml", *(path.name for path in tiny_track.parent.glob("*.bin"))):
        shutil.copy(tiny_track.parent / name, tmp_path)
    track = tmp_path / "tiny.toml"
    track.write_text(track.read_text().replace(str(tiny_track.parent), str(tmp_path)))
    shard = tmp_path / "tiny_train_000001.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    line = lines_of(capsys, track, "--out", tmp_path)["data"]
    assert line["status"] == "error" and shard.name in line["found"] and line["fix"] == "get the file again"
    for path in tmp_path.glob("*.bin"):
        path.unlink()
    lines = lines_of(capsys, track, "--out", tmp_path)
    assert lines["data"]["status"] == "error" and "python data/local.py" in lines["data"]["fix"]
    assert lines["disk of data"]["status"] == "ok"


def test_settings_that_cannot_be_are_one_line(tiny_track, tmp_path, capsys):
    lines = lines_of(capsys, tiny_track, "--out", tmp_path, "--set", "train.stepps=3")
    assert lines["settings"]["status"] == "error" and "stepps" in lines["settings"]["found"]


def test_numbers_that_a_gpu_does_not_tell_are_no_fault():
    assert probes.gpu_of("0, NVIDIA GB10, 580.95, [N/A], [N/A], 3, 208, 2418")[3:6] == (0, 0, 3)


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    assert probes.why_not_writable(tmp_path / "file" / "out") and not probes.why_not_writable(tmp_path / "a" / "b")


@pytest.mark.slow
def test_a_low_limit_of_a_real_process_and_a_checkout_without_optional_packages(tiny_track, tmp_path):
    code = "import sys; sys.modules |= dict.fromkeys(('datasets', 'wandb', 'matplotlib', 'scipy', 'triton'))\n"
    code += "from scripts.doctor import main\nsys.exit(main(sys.argv[1:]))"
    command = ["-c", code, "--config", str(tiny_track), "--out", str(tmp_path)]
    limit = (300, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    process = start_process(*command, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limit), cwd=ROOT)
    said, error = process.communicate(timeout=120)
    assert process.returncode == 0, said + error
    assert "warning open files    300 allowed" in said and "-> ulimit -n" in said and "0 errors" in said
