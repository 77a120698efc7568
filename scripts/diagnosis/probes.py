"""What scripts/doctor.py reads of this machine. Every probe answers where there is nothing to read, too."""

import contextlib
import importlib
import os
import resource
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple


class Gpu(NamedTuple):
    number: int
    name: str
    driver: str
    total_mib: int
    used_mib: int
    busy_percent: int
    clock_mhz: int
    max_clock_mhz: int


GPU_FIELDS = "index,name,driver_version,memory.total,memory.used,utilization.gpu,clocks.sm,clocks.max.sm"


class Stack(NamedTuple):
    """What torch says of itself and its GPUs; error: why it cannot be imported."""

    error: str = ""
    torch: str = ""
    cuda: str | None = None
    cudnn: int | None = None
    nccl: str | None = None
    num_gpus: int = 0
    without_peers: tuple[tuple[int, int], ...] = ()  # pairs of GPUs that do not reach each other's memory


def gpus() -> list[Gpu]:
    """The NVIDIA GPUs that this machine's driver knows."""
    lines = _nvidia_smi(f"--query-gpu={GPU_FIELDS}", "--format=csv,noheader,nounits").splitlines()
    return [gpu_of(line) for line in lines if line.count(",") == GPU_FIELDS.count(",")]


def gpu_of(line: str) -> Gpu:
    number, name, driver, *others = (word.strip() for word in line.split(","))
    return Gpu(int(number), name, driver, *(int(word) if word.isdigit() else 0 for word in others))  # or "[N/A]"


def driver_cuda() -> str:
    """The newest CUDA that the driver supports, as "13.0"; empty without a driver."""
    head = _nvidia_smi().partition("CUDA Version:")[2].split()
    return head[0] if head else ""


def _nvidia_smi(*arguments: str) -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=30, check=True).stdout
    return ""


def stack() -> Stack:
    try:
        torch: Any = importlib.import_module("torch")
    except Exception as error:  # an installation of other parts may raise anything
        return Stack(error=str(error).partition("\n")[0] or type(error).__name__)
    version, cuda = str(torch.__version__), torch.version.cuda
    if not cuda or not torch.cuda.is_available():
        return Stack("", version, cuda)
    number = torch.cuda.device_count()
    pairs = [(a, b) for a in range(number) for b in range(number) if a != b]
    without = tuple(pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair))
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None
    return Stack("", version, cuda, torch.backends.cudnn.version(), nccl, number, without)


def version_of(module: str) -> str:
    """Of a module that can be imported; else empty."""
    try:
        return str(importlib.import_module(module).__version__)
    except Exception:  # a broken installation may raise anything, and its line then says that the module is missing
        return ""


def free_memory_bytes() -> int:
    """Of the host, that programs may still take; of the container, where that is less."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
        limit = Path("/sys/fs/cgroup/memory.max").read_text() if Path("/sys/fs/cgroup/memory.max").exists() else "max"
        return min(available, int(limit)) if limit.strip().isdigit() else available
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def why_not_writable(folder: Path) -> str:
    """Why no file can be made in the folder, which is not made for it; empty if one can."""
    try:
        with tempfile.TemporaryFile(dir=existing(folder)):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def disk_free_bytes(folder: Path) -> int:
    return shutil.disk_usage(existing(folder)).free


def open_files_limit() -> tuple[int, int]:
    """Of this process: now, and up to where it may be raised."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    endless = 2**31
    return (endless if soft == resource.RLIM_INFINITY else soft), (endless if hard == resource.RLIM_INFINITY else hard)


def shared_memory_bytes() -> int | None:
    """The size of /dev/shm; None where there is none, as on macOS."""
    try:
        return shutil.disk_usage("/dev/shm").total
    except OSError:
        return None
