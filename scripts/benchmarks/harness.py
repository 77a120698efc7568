"""The trainer's step on CPU against loops that one would write by hand around the model, and against other trainers.

All take turns in one run: in each round every contender makes one step of the quick track's batch.
"""

import argparse
import contextlib
import importlib.util
import itertools
import shlex
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import train_gpt
from aurora.config import ROOT, Config, load_config
from aurora.errors import Exit, HarnessError
from aurora.fast.forward import FastForward
from aurora.trainer.identity import describe_machine
from aurora.trainer.ranks import Ranks, keep_freed_memory
from aurora.trainer.setup import open_data
from scripts.benchmarks.train import own_command, ready_run, write

QUICK = ROOT / "configs" / "quick.toml"
UNTIMED_ROUNDS = 3
TORCH_MUON = {"polar_schedule": "ns5_jordan", "polar_dtype": "bfloat16"}  # as torch.optim.Muon has them
PLAIN_MUON = "the model called plainly, torch.optim.Muon, float32"
ONE_CPU = Ranks(0, 1, torch.device("cpu"))
Step = Callable[[], object]


def config_of(
    optimizer: str, num_steps: int, dtype: str, hparams: dict[str, str] | None = None, mode: str = "off"
) -> Config:
    """The quick track in that dtype. mode: of train.compile."""
    settings = {"steps": str(num_steps)} | (hparams or {})
    overrides = [f"optimizer.{optimizer}.{key}={value}" for key, value in settings.items()]
    return load_config(QUICK, optimizer, [f"model.activation_dtype={dtype}", f"train.compile={mode}", *overrides])


def ours(config: Config, attention: str = "") -> Step:
    """One call is one step of the trainer, with everything that its clock sees.

    attention: "torch's" or "blocked", in the place of what the trainer chooses.
    """
    run, model = ready_run(config, ONE_CPU)
    if attention:
        model = FastForward(run.model, attention)
    steps = iter(range(config.train.steps))
    return lambda: train_gpt.train_step(run, model, next(steps))


def batches_of(config: Config) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and targets (B, T) of one step after the other."""
    tokens = torch.from_numpy(open_data(config).train_shards[0].astype("int64"))
    for start in range(0, len(tokens), config.train.batch_tokens):
        window = tokens[start : start + config.train.batch_tokens + 1]
        yield window[:-1].view(-1, config.model.seq_len), window[1:].view(-1, config.model.seq_len)


def bare_torch(config: Config) -> Step:
    """One call is one step of the loop that one would write by hand around the model, with torch's own optimizers."""
    model = train_gpt.GPT(config.model)
    model.init_weights(0)
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is q for q in matrices)]
    adamw = torch.optim.AdamW(others, lr=0.003, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0, fused=True)
    muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0, adjust_lr_fn="original")
    optimizers, batches = [adamw, muon], batches_of(config)

    def step() -> None:
        (model(*next(batches)) / config.train.batch_tokens).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step


def bare_nanogpt(folder: Path, config: Config, is_compiled: bool) -> Step:
    """One call is one step of nanoGPT's model, of the track's size, by its optimizer, with clipped gradients.

    In bfloat16 under autocast, as it is on GPUs.
    """
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    assert spec and spec.loader  # as of any .py file
    nanogpt = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nanogpt)
    sizes = config.model
    torch.manual_seed(0)
    model = nanogpt.GPT(
        nanogpt.GPTConfig(
            block_size=sizes.seq_len, vocab_size=sizes.vocab_size, n_layer=sizes.num_layers, n_head=sizes.num_heads,
            n_embd=sizes.model_dim, dropout=0.0, bias=True,
        )
    )  # fmt: skip
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cpu")
    called, batches = torch.compile(model) if is_compiled else model, batches_of(config)
    is_narrow = sizes.activation_dtype == "bfloat16"

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16) if is_narrow else contextlib.nullcontext():
            _, loss = called(*next(batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def program(command: str) -> Step:
    """One call is one step of another program, which makes one for each line that it reads and then writes a line."""
    process = subprocess.Popen(shlex.split(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    asked, answered = process.stdin, process.stdout
    assert asked and answered

    def step() -> None:
        with contextlib.suppress(BrokenPipeError):
            print(file=asked, flush=True)
        if not answered.readline():
            raise HarnessError(Exit.CONFIG, f"{command}: it ended with {process.wait()} before its step")

    return step


def contenders_of(args: argparse.Namespace, num_steps: int) -> dict[str, Step]:
    """Everything that takes turns, by its label."""
    narrow, wide = (config_of("adamw", num_steps, dtype) for dtype in ("bfloat16", "float32"))
    muon = config_of("muon", num_steps, "float32", TORCH_MUON)
    found = {
        "ours, bfloat16": ours(narrow),
        "ours, bfloat16, torch's attention": ours(narrow, "torch's"),
        "ours, float32": ours(wide),
        "ours, float32, blocked attention": ours(wide, "blocked"),
        "ours, float32, Muon": ours(muon),
        PLAIN_MUON: bare_torch(muon),
    }
    with contextlib.suppress(HarnessError):  # where nothing compiles
        for dtype in ("bfloat16", "float32"):
            found[f"ours, {dtype}, compiled"] = ours(config_of("adamw", num_steps, dtype, mode="on"))
    if args.nanogpt:
        for config, is_compiled in itertools.product((narrow, wide), (False, True)):
            label = f"nanoGPT, {config.model.activation_dtype}, {'compiled' if is_compiled else 'eager'}"
            found[label] = bare_nanogpt(args.nanogpt, config, is_compiled)
    return found | {label: program(command) for label, command in args.program}


def harness(args: argparse.Namespace) -> str:
    """A Markdown table of all contenders' steps after args.rounds rounds; with args.out, also OUT.md and OUT.json."""
    if args.nanogpt and not (args.nanogpt / "model.py").is_file():
        message = f"{args.nanogpt} has no model.py; give a checkout of github.com/karpathy/nanoGPT"
        raise HarnessError(Exit.CONFIG, message)
    keep_freed_memory()
    contenders = contenders_of(args, UNTIMED_ROUNDS + args.rounds)
    times: dict[str, list[float]] = {label: [] for label in contenders}
    for number in range(UNTIMED_ROUNDS + args.rounds):
        for label in contenders if number % 2 else reversed(contenders):
            begin_ns = time.perf_counter_ns()
            contenders[label]()
            if number >= UNTIMED_ROUNDS:
                times[label].append((time.perf_counter_ns() - begin_ns) / 1e6)
    result = {
        "command": own_command(),
        "machine": describe_machine() | {"torch": torch.__version__, "threads": torch.get_num_threads()},
        "config": QUICK.name,
        "rounds_ms": times,
    }
    text = harness_table(result)
    if args.out:
        write(args.out, result, text)
    return text


def harness_table(result: dict[str, Any]) -> str:
    times, machine = result["rounds_ms"], result["machine"]
    bases = "ours, bfloat16", "ours, float32"
    rounds = len(times[bases[0]])
    lines = [
        f"{result['config']} on {machine['cpu']}, threads: {machine['threads']}, torch {machine['torch']}; {rounds} "
        "interleaved rounds. Ours and nanoGPT's with AdamW but where it says Muon",
        "",
        f"    {result['command']}",
        "",
        "| contender | ms/step | ours in bfloat16 to it | middle half | ours in float32 to it | middle half |",
        "|---|---|---|---|---|---|",
    ]
    for label, ms in times.items():
        cells = [label, f"{statistics.median(ms):.1f}"]
        for base in bases:
            low, ratio, high = statistics.quantiles([a / b for a, b in zip(times[base], ms, strict=True)], n=4)
            cells += [f"{ratio:.3f}", f"{low:.2f} to {high:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    ratios = [a / b for a, b in zip(times["ours, float32, Muon"], times[PLAIN_MUON], strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    lines += ["", f"Ours with Muon to {PLAIN_MUON}: {ratio:.3f} ({low:.2f} to {high:.2f})"]
    return "\n".join(lines) + "\n"
