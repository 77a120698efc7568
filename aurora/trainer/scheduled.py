"""What is scheduled in a run's optimizers: the values it begins from, those that the record logs, and words for it."""

from collections.abc import Iterator
from typing import Any

import torch

from aurora.config import Config
from aurora.errors import Exit, HarnessError
from aurora.schedule import PEAKS, ROLES, Pieces, pieces_of, spans


def keep_peaks(optimizers: list[torch.optim.Optimizer], config: Config) -> None:
    """Keep in each parameter group the weight decay and momentum that its schedule starts from, as "peak_lr" is kept.

    Raises:
        HarnessError: CONFIG, for a schedule that would change nothing, as no group has what it schedules.
    """
    schedule = vars(config.schedule)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group in groups:
        for key, peak in PEAKS.items():
            if key in group and pieces_of(schedule, group["role"], key):
                group[peak] = group[key]
    for key in PEAKS:
        for role in (None, *ROLES):
            table = schedule if role is None else schedule[role] or {}
            # A momentum of 0 may rise; a decay of 0 stays 0, for its schedule is in shares of it.
            own = [group for group in groups if role in (None, group["role"])]
            if table.get(key) and not any(group.get(key) if key == "weight_decay" else key in group for group in own):
                name = ".".join(filter(None, ("schedule", role, key)))
                what = "a weight_decay above 0" if key == "weight_decay" else key
                fix = f"drop it, or move it to [optimizer.NAME.schedule] of those that have {what}"
                whose = f"of role {role} " if role else ""
                message = f"{name} changes nothing: {config.optimizer} has no parameter group {whose}with {what}"
                raise HarnessError(Exit.CONFIG, f"{message}; {fix}")


def scheduled_values(optimizers: list[torch.optim.Optimizer], config: Config) -> dict[str, float]:
    """What groups hold of all that has pieces, under "ROLE.KEY"; without the first lr, which every event has."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    schedule = vars(config.schedule)
    return {
        f"{group['role']}.{key}": float(group[key])
        for group in groups
        for key, peak in PEAKS.items()
        if peak in group and pieces_of(schedule, group["role"], key) and not (key == "lr" and group is groups[0])
    }


def schedule_lines(optimizers: list[torch.optim.Optimizer], config: Config) -> Iterator[str]:
    """For a dry run: the planned steps, and each schedule with the roles whose groups it changes."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    schedule, steps = config.schedule, config.train.steps
    planned = schedule.planned_steps or steps
    if planned != steps:
        yield f"schedule: planned for {planned:,} steps, the run ends at step {steps:,}"
    for key, peak in PEAKS.items():
        roles_of: dict[str, list[str]] = {}
        for group in [group for group in groups if peak in group]:
            pieces = pieces_of(vars(schedule), group["role"], key)
            level = group[peak] if key == "momentum" else 1.0
            words = in_words(pieces, planned, level) if pieces else short_form_in_words(config, planned)
            roles_of.setdefault(words, []).append(group["role"])
        for words, roles in roles_of.items():
            whose = f" ({', '.join(roles)})" if len(roles) < len(groups) else ""
            yield f"schedule of {key}{whose}: {words}"


def in_words(pieces: Pieces, planned_steps: int, level: float) -> str:
    words = []
    for _, end, first, last, piece in spans(pieces, planned_steps, level):
        shape = piece.get("shape", "linear") + (f" {piece['exponent']:g}" if "exponent" in piece else "")
        change = f"{first:g}" if first == last else f"{first:g} to {last:g} ({shape})"
        words.append(f"{change} until step {end:,.10g}")
    return ", ".join(words)


def short_form_in_words(config: Config, planned_steps: int) -> str:
    schedule = config.schedule
    assert schedule.cooldown_frac is not None and schedule.final_lr_frac is not None
    start = (1 - schedule.cooldown_frac) * planned_steps
    rise = f"0 to 1 (linear) in {config.warmup_steps:,} steps, " if config.warmup_steps else ""
    fall = f", 1 to {schedule.final_lr_frac:g} (linear) until step {planned_steps:,}" if schedule.cooldown_frac else ""
    return f"{rise}1 until step {start:,.10g}{fall}"


def is_scheduled(key: str, group: dict[str, Any]) -> bool:
    """Whether a setting of a parameter group is set anew in each step."""
    return key in PEAKS and PEAKS[key] in group


def limit_of(key: str, group: dict[str, Any]) -> float:
    """The most that a schedule may set. Shares are at most 1."""
    return 1.0 if key == "momentum" else group[PEAKS[key]]
