"""The trainer's step on CPU against loops that one would write by hand around the model."""

import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import train_gpt
from aurora.config import ROOT, load_config
from aurora.errors import Exit, HarnessError
from aurora.trainer.ranks import Ranks, keep_freed_memory
from aurora.trainer.setup import open_data
from scripts.benchmarks.train import ready_run

QUICK = ROOT / "configs" / "quick.toml"
UNTIMED_ROUNDS = 3


def harness_step(
    hparams: dict[str, str], num_steps: int, ranks: Ranks, optimizer: str = "muon"
) -> Callable[[], object]:
    """One call is one step of the trainer, with everything that its clock sees."""
    hparams = hparams | {"steps": str(num_steps)}
    overrides = [f"optimizer.{optimizer}.{key}={value}" for key, value in hparams.items()]
    run, model = ready_run(load_config(QUICK, optimizer, overrides), ranks)
    steps = iter(range(num_steps))
    return lambda: train_gpt.train_step(run, model, next(steps))


def bare_torch() -> Callable[[], None]:
    """One call is one step of the loop that one would write by hand around the model, with torch's own optimizers."""
    config = load_config(QUICK, "muon")
    data = open_data(config)
    model = train_gpt.GPT(config.model)
    model.init_weights(0)
    tokens = torch.from_numpy(data.train_shards[0].astype("int64"))
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is q for q in matrices)]
    adamw = torch.optim.AdamW(others, lr=0.003, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0, fused=True)
    muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0, adjust_lr_fn="original")
    optimizers = [adamw, muon]
    starts = iter(range(0, len(tokens), config.train.batch_tokens))

    def step() -> None:
        start = next(starts)
        window = tokens[start : start + config.train.batch_tokens + 1]
        inputs, targets = (side.view(-1, config.model.seq_len) for side in (window[:-1], window[1:]))
        (model(inputs, targets) / config.train.batch_tokens).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step


def bare_nanogpt(folder: Path) -> Callable[[], None]:
    """One call is one step of nanoGPT's model, of the quick track's size, by its optimizer, with clipped gradients."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    assert spec and spec.loader  # as of any .py file
    nanogpt = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nanogpt)
    config = load_config(QUICK, "adamw")
    sizes = config.model
    torch.manual_seed(0)
    model = nanogpt.GPT(
        nanogpt.GPTConfig(
            block_size=sizes.seq_len, vocab_size=sizes.vocab_size, n_layer=sizes.num_layers, n_head=sizes.num_heads,
            n_embd=sizes.model_dim, dropout=0.0, bias=True,
        )
    )  # fmt: skip
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cpu")
    tokens = torch.from_numpy(open_data(config).train_shards[0].astype("int64"))
    starts = iter(range(0, len(tokens), config.train.batch_tokens))

    def step() -> None:
        start = next(starts)
        window = tokens[start : start + config.train.batch_tokens + 1]
        _, loss = model(*(side.view(-1, sizes.seq_len) for side in (window[:-1], window[1:])))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def interleaved_ms(first: Callable[[], object], second: Callable[[], object], rounds: int) -> list[tuple[float, float]]:
    """Milliseconds of both, in A B B A order, after the untimed rounds."""
    pairs = []
    for number in range(UNTIMED_ROUNDS + rounds):
        times = {}
        for step in (first, second) if number % 2 else (second, first):
            begin_ns = time.perf_counter_ns()
            step()
            times[step] = (time.perf_counter_ns() - begin_ns) / 1e6
        pairs.append((times[first], times[second]))
    return pairs[UNTIMED_ROUNDS:]


def harness(rounds: int, nanogpt: Path | None) -> str:
    """A Markdown table of the trainer's step against bare loops, and against that of a checkout of nanoGPT."""
    if nanogpt and not (nanogpt / "model.py").is_file():
        raise HarnessError(Exit.CONFIG, f"{nanogpt} has no model.py; give a checkout of github.com/karpathy/nanoGPT")
    keep_freed_memory()
    ranks = Ranks(0, 1, torch.device("cpu"))
    lines = [
        f"quick track, torch {torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, "
        f"{rounds} interleaved rounds",
        "",
        "| peer | train_gpt.py ms/step | peer ms/step | median ratio | middle half of ratios |",
        "|---|---|---|---|---|",
    ]
    settings = {"polar_schedule": "ns5_jordan", "polar_dtype": "bfloat16"}  # torch's
    pairs = {"torch.optim.Muon and AdamW, the model called plainly": ("muon", settings, bare_torch)}
    if nanogpt:
        pairs["nanoGPT's model and AdamW"] = "adamw", {}, lambda: bare_nanogpt(nanogpt)
    for name, (optimizer, hparams, make_peer) in pairs.items():
        ours = harness_step(hparams, UNTIMED_ROUNDS + rounds, ranks, optimizer=optimizer)
        times = interleaved_ms(ours, make_peer(), rounds)
        ours_ms, theirs_ms = (statistics.median(column) for column in zip(*times, strict=True))
        low, ratio, high = statistics.quantiles([a / b for a, b in times], n=4)
        lines.append(f"| {name} | {ours_ms:.1f} | {theirs_ms:.1f} | {ratio:.3f} | {low:.2f} to {high:.2f} |")
    return "\n".join(lines)
