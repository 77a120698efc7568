"""The trainer's step on CPU against loops that one would write by hand, and with its guards against without."""

import importlib.util
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import train_gpt
from aurora.config import ROOT, load_config
from aurora.errors import Exit, HarnessError
from aurora.optim.polar import SCHEDULES, PolarSchedule
from aurora.trainer.batch import stage, to_device
from aurora.trainer.neurons import Neurons
from aurora.trainer.ranks import SETUP_TIMEOUT_S, Ranks, join_ranks, keep_freed_memory, leave_ranks
from aurora.trainer.setup import open_data
from aurora.trainer.watch import Watch
from scripts.benchmarks.train import ready_run

QUICK = ROOT / "configs" / "quick.toml"
UNTIMED_ROUNDS = 3


class PlainMuon(torch.optim.Optimizer):
    """Muon one matrix at a time, in a few lines: what one would write without a library."""

    def __init__(self, params, lr: float, momentum: float, schedule: PolarSchedule):
        super().__init__(params, dict(lr=lr, momentum=momentum))
        self.schedule = schedule

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p not in self.state:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                buffer = self.state[p]["momentum_buffer"]
                buffer.lerp_(p.grad, 1 - group["momentum"])
                X = p.grad.lerp(buffer, group["momentum"])
                X = X.T if p.shape[0] > p.shape[1] else X
                X = X / (self.schedule.norm_margin * X.norm() + 1e-7)
                for a, b, c in self.schedule.coefficients:
                    A = X @ X.T
                    X = a * X + (b * A + c * A @ A) @ X
                X = X.T if p.shape[0] > p.shape[1] else X
                p.add_(X, alpha=-group["lr"] * math.sqrt(max(1, p.shape[0] / p.shape[1])))


class NoGuard:
    """In the place of a run's guard: nothing is checked."""

    def look(self, loss: Tensor) -> None: ...

    def check(self, step: int, rule: torch.optim.Optimizer) -> None: ...


def harness_step(
    hparams: dict[str, str], num_steps: int, ranks: Ranks, is_guarded: bool = True, optimizer: str = "muon"
) -> Callable[[], None]:
    """One call is one step of the trainer, with everything that its clock sees; the guards only if wanted."""
    hparams = hparams | {"steps": str(num_steps)}
    overrides = [f"optimizer.{optimizer}.{key}={value}" for key, value in hparams.items()]
    run, model = ready_run(load_config(QUICK, optimizer, overrides), ranks)
    steps = iter(range(num_steps))
    if not is_guarded:
        run.guard = NoGuard()
    return lambda: train_gpt.train_step(run, model, next(steps))


def bare_step(make_muon: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Callable[[], None]:
    """One call is one step of the loop that one would write by hand around the model, called plainly."""
    config = load_config(QUICK, "muon")
    data = open_data(config)
    model = train_gpt.GPT(config.model)
    model.init_weights(0)
    tokens = torch.from_numpy(data.train_shards[0].astype("int64"))
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is q for q in matrices)]
    adamw = torch.optim.AdamW(others, lr=0.003, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0, fused=True)
    optimizers = [adamw, make_muon(matrices)]
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


def bare_plain() -> Callable[[], None]:
    return bare_step(lambda params: PlainMuon(params, lr=0.02, momentum=0.95, schedule=SCHEDULES["polar_express5"]))


def bare_torch() -> Callable[[], None]:
    return bare_step(lambda params: torch.optim.Muon(params, lr=0.02, weight_decay=0.0, adjust_lr_fn="original"))


def bare_nanogpt(folder: Path) -> Callable[[], None]:
    """One call is one step of nanoGPT's model, of the quick track's size, by its optimizer, with clipped gradients."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
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


HARNESS_PAIRS = {
    "Muon written plainly (polar_express5, float32)": (
        "muon",
        {"polar_schedule": "polar_express5", "polar_dtype": "float32"},
        bare_plain,
    ),
    "torch.optim.Muon (ns5_jordan, bfloat16)": (
        "muon",
        {"polar_schedule": "ns5_jordan", "polar_dtype": "bfloat16"},
        bare_torch,
    ),
}


def interleaved_ms(first: Callable[[], None], second: Callable[[], None], rounds: int) -> list[tuple[float, float]]:
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
    pairs = dict(HARNESS_PAIRS)
    if nanogpt:
        pairs["nanoGPT's model and AdamW"] = "adamw", {}, lambda: bare_nanogpt(nanogpt)
    for name, (optimizer, hparams, make_peer) in pairs.items():
        ours = harness_step(hparams, UNTIMED_ROUNDS + rounds, ranks, optimizer=optimizer)
        times = interleaved_ms(ours, make_peer(), rounds)
        ours_ms, theirs_ms = (statistics.median(column) for column in zip(*times, strict=True))
        low, ratio, high = statistics.quantiles([a / b for a, b in times], n=4)
        lines.append(f"| {name} | {ours_ms:.1f} | {theirs_ms:.1f} | {ratio:.3f} | {low:.2f} to {high:.2f} |")
    return "\n".join(lines)


def guards(rounds: int) -> str:
    """A Markdown table of one row: what the guards of a step cost; under torchrun, on several ranks.

    These also exchange four numbers a step, and their watch looks twice a second, in a thread of its own.
    """
    os.environ["SPEEDRUN_DEVICE"] = "cpu"
    ranks = join_ranks(SETUP_TIMEOUT_S)
    on, off = (harness_step({}, UNTIMED_ROUNDS + rounds, ranks, is_guarded) for is_guarded in (True, False))
    pairs = interleaved_ms(on, off, rounds)
    on_ms, off_ms = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    look = "-"
    if ranks.world_size > 1:
        watch = Watch(ranks, timeout_s=60).started()
        looks_ms = []
        for _ in range(rounds):
            begin_ns = time.perf_counter_ns()
            watch.look()
            looks_ms.append((time.perf_counter_ns() - begin_ns) / 1e6)
        watch.stop()
        look = f"{statistics.median(looks_ms):.2f} ms each {1000 * watch.poll_s:.0f} ms"
        ranks.align()
        leave_ranks()
    return "\n".join([
        f"quick track, Muon, torch {torch.__version__}, {torch.get_num_threads()} threads a rank, "
        f"{rounds} rounds in turn",
        "",
        "| ranks | ms/step with guards | without | median ratio | a look of the watch |",
        "|---|---|---|---|---|",
        f"| {ranks.world_size} | {on_ms:.1f} | {off_ms:.1f} | {ratio:.4f} | {look} |",
    ]) * ranks.is_main  # fmt: skip


def telemetry(rounds: int) -> str:
    """One line: the share of a quick run's steps and validations that its looks at neurons take, all off the clock."""
    keep_freed_memory()
    ranks = Ranks(0, 1, torch.device("cpu"))
    run, model = ready_run(load_config(QUICK, "muon", [f"train.steps={UNTIMED_ROUNDS + rounds}"]), ranks)
    whole = load_config(QUICK, "muon")
    looks = train_gpt.validation_steps(whole)
    neurons = Neurons(whole, looks, run.model, run.rule, ranks)
    window = stage(run.val_tokens[: neurons.num_tokens + 1], ranks.device)
    batch = to_device(window, whole.model.seq_len, ranks.device)
    ms: dict[str, list[float]] = {"keep": [], "step": [], "validate": [], "measure": []}
    for step in range(UNTIMED_ROUNDS + rounds):
        for name, call in (
            ("keep", neurons.before_update),
            ("step", lambda step=step: train_gpt.train_step(run, model, step)),
            ("validate", lambda: train_gpt.validate(run, model)),
            ("measure", lambda step=step: neurons.measure(step, *batch)),
        ):
            begin_ns = time.perf_counter_ns()
            call()
            ms[name].append((time.perf_counter_ns() - begin_ns) / 1e6)
    median = {name: statistics.median(times[UNTIMED_ROUNDS:]) for name, times in ms.items()}
    look_ms = median["keep"] + median["measure"]
    rest_ms = whole.train.steps * median["step"] + len(looks) * median["validate"]
    share = len(neurons.steps) * look_ms / (len(neurons.steps) * look_ms + rest_ms)
    return (
        f"quick track, Muon, torch {torch.__version__}, {torch.get_num_threads()} threads, {rounds} rounds in turn: "
        f"{look_ms:.0f} ms a look at the neurons, {len(neurons.steps)} of them in a run, {share:.2%} of steps of "
        f"{median['step']:.0f} ms and validations of {median['validate']:.0f} ms"
    )
