"""What a run takes: FLOP, tokens a second, the share of a GPU's peak, hours and money. Needs nothing but Python.

FLOP of a token in training, as in PaLM (Chowdhery et al. 2022, appendix B, https://arxiv.org/abs/2204.02311):
6 N + 12 L H Q T, for N weights that are multiplied with, L layers, H heads of Q, and T positions. N has matrices and
head: the embedding is looked up. Attention counts as if it were not causal. What the optimizer computes does not count.
MFU, the model's FLOP utilization, is what tokens took of that, by the peak of all GPUs.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from aurora.config import Config

# Dense bfloat16 TFLOP/s by NVIDIA's data sheets, without sparsity. The first name that the device's contains counts.
CARDS = {
    "B200": 2250.0,
    "H200 NVL": 835.5,
    "GH200": 989.4,
    "H200": 989.4,
    "H100 NVL": 835.5,
    "H100 PCIe": 756.0,
    "H100": 989.4,  # SXM
    "A100": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.2,
}
SHOWN = ("B200", "H200", "H100", "A100", "L40S", "RTX 4090")  # where a dry run sees none of the cards
# Of the peak: public runs of the optimization benchmark on H100 and H200 took 0.38 to 0.43 in training, those on cards
# that talk over PCIe half of it.
USUAL_MFU = 0.40


def peak_flops(device_name: str, dtype: str) -> float | None:
    """FLOP/s of a device that is in the table, in bfloat16, for which the table is."""
    found = next((peak for name, peak in CARDS.items() if name in device_name), None)
    return found * 1e12 if found and dtype == "bfloat16" else None


def flop_per_token(params_by_role: Mapping[str, int], model: Mapping[str, Any]) -> int:
    """Of a step, forward and backward. model: the settings, as a record has them."""
    matmul = 6 * (params_by_role.get("matrix", 0) + params_by_role.get("head", 0))
    return matmul + 12 * model["num_layers"] * model["model_dim"] * model["seq_len"]


class Speed(NamedTuple):
    """What the end event says of it; None where it cannot be told."""

    tokens_per_s: float | None
    mfu: float | None


def speed_of(steps: int, train_s: float, segments: int, start: Mapping[str, Any]) -> Speed:
    """Of a run's steps and timed seconds. start: its run event.

    No MFU of a resumed run, whose GPUs may have been others, and of an edited model, whose FLOP nobody has counted.
    """
    config, tokens = start["config"], steps * start["config"]["train"]["batch_tokens"]
    if not train_s or not tokens:
        return Speed(None, None)
    tokens_per_s, is_known = tokens / train_s, segments == 1 and not start["model_edits"]
    peak = peak_of(start) if is_known else None
    if not peak:
        return Speed(tokens_per_s, None)
    return Speed(tokens_per_s, tokens_per_s * flop_per_token(start["params_by_role"], config["model"]) / peak)


def peak_of(start: Mapping[str, Any]) -> float | None:
    """Of all GPUs of a run event."""
    name, dtype = start["env"]["device_name"], start["config"]["model"]["activation_dtype"]
    peak = peak_flops(name, dtype) if start["device"] == "cuda" else None
    return peak * start["world_size"] if peak else None


class Estimate(NamedTuple):
    train_s: float
    val_s: float
    tokens_per_s: float

    def gpu_hours(self, world_size: int) -> float:
        return (self.train_s + self.val_s) * world_size / 3600


def estimate(config: Config, params_by_role: Mapping[str, int], flops: float) -> Estimate:
    """Of a whole run at so many FLOP/s of all GPUs together, without start and compilation."""
    train_tokens = config.train.steps * config.train.batch_tokens
    each = flop_per_token(params_by_role, vars(config.model))
    # A forward pass is a third of forward and backward.
    val_flop = num_validations(config) * config.eval.tokens * each / 3
    return Estimate(train_tokens * each / flops, val_flop / flops, flops / each)


def num_validations(config: Config) -> int:
    steps, evaluation = config.train.steps, config.eval
    late_from = (1 - evaluation.late_frac) * steps
    late = math.ceil(steps / evaluation.late_every) - math.ceil(late_from / evaluation.late_every)
    return math.ceil(late_from / evaluation.every) + late + 1


def time_lines(
    config: Config, params_by_role: Mapping[str, int], world_size: int, device_name: str, price: float | None
) -> list[str]:
    """What a dry run says of time and money, on these GPUs or, where there is none of the table, by card."""
    each = flop_per_token(params_by_role, vars(config.model))
    tokens = config.train.steps * config.train.batch_tokens
    lines = [
        f"FLOP: {each:.4g} a token, {each * config.train.batch_tokens:.4g} a step, {each * tokens:.4g} in training"
    ]
    peak = peak_flops(device_name, config.model.activation_dtype)
    if peak:
        found = estimate(config, params_by_role, USUAL_MFU * peak * world_size)
        step_ms = 1000 * found.train_s / config.train.steps
        lines.append(
            f"time, at {USUAL_MFU:.0%} of the peak of {world_size} x {device_name}: {in_words(found.train_s)} of "
            f"training, {step_ms:.0f} ms a step, {found.tokens_per_s:,.0f} tokens/s; {in_words(found.val_s)} of "
            f"validation; {spent(found.gpu_hours(world_size), price)}"
        )
    elif config.model.activation_dtype == "bfloat16":
        hours = {name: estimate(config, params_by_role, USUAL_MFU * CARDS[name] * 1e12).gpu_hours(1) for name in SHOWN}
        by_card = ", ".join(f"{name} {spent(value, price, '')}" for name, value in hours.items())
        lines.append(f"GPU hours, at {USUAL_MFU:.0%} of the peak: {by_card}")
    if not peak:
        lines.append(f"time: not known of {device_name}; a run says it after its first steps")
    return lines


def speed_words(speed: Speed, wall_s: float, start: Mapping[str, Any], price: float | None) -> str:
    """For the console: speed, and on GPUs what so many seconds of a run take of them."""
    words = [f"{speed.tokens_per_s:,.0f} tokens/s"] if speed.tokens_per_s else []
    words += [f"MFU {speed.mfu:.1%}"] if speed.mfu else []
    words += [spent(wall_s * start["world_size"] / 3600, price)] if start["device"] == "cuda" else []
    return ", ".join(words)


def spent(gpu_hours: float, price: float | None, unit: str = " GPU hours") -> str:
    """GPU hours, and what they cost at a price for one."""
    return f"{gpu_hours:.3g}{unit}" + (f" (costs {gpu_hours * price:.2f})" if price is not None else "")


def in_words(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"
