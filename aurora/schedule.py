"""Schedules of lr, weight decay and momentum: what a track may declare, and what holds in each step.

A schedule is a list of pieces. A piece leads from the end of the piece before to its own end:

    value = to + (from - to) fall(left)        left = (end - step) / (end - start), from 1 down to 0

    shape     fall(left)
    linear    left
    cosine    sin(pi left / 2)^2, which is half a cosine
    sqrt      1 - sqrt(1 - left)
    power     left ** exponent

Behind the last piece its `to` holds. Steps count from 0, so `from` is the value of a piece's first step.

Trainer and verification compute with these functions alone. They need nothing but Python.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from aurora.text import shown, suggest

Pieces = list[dict[str, Any]]

ROLES = ("matrix", "embed", "head", "vector")
# What may be scheduled, and under which key a parameter group keeps the value that the optimizer's table gave it.
PEAKS = {"lr": "peak_lr", "weight_decay": "peak_weight_decay", "momentum": "peak_momentum"}
SHORT_FORM = ("cooldown_frac", "final_lr_frac")
SHAPES = ("linear", "cosine", "sqrt", "power")
MOST_PIECES, MOST_STEPS, LARGEST_EXPONENT = 64, 1_000_000, 100.0


# ---- the values ----


def settings_at(
    step: int, group: Mapping[str, Any], schedule: Mapping[str, Any], steps: int, warmup_steps: int
) -> dict[str, float]:
    """What a parameter group holds in a step: lr, and weight_decay and momentum where they are scheduled.

    Args:
        step: from 0.
        group: with "role", and the values of the optimizer's table under the keys of PEAKS.
        schedule: the fields of ScheduleConfig.
        steps: of the run. warmup_steps: of the short form.
    """
    planned_steps, found = schedule.get("planned_steps") or steps, {}
    for key, peak in PEAKS.items():
        if peak not in group:
            continue
        pieces = pieces_of(schedule, group["role"], key)
        if pieces and key == "momentum":
            found[key] = value_at(step, pieces, planned_steps, group[peak])
        elif pieces:
            found[key] = group[peak] * value_at(step, pieces, planned_steps, 1.0)
        elif key == "lr":
            share = flat_then_linear(step, planned_steps, warmup_steps, *(schedule[name] for name in SHORT_FORM))
            found[key] = group[peak] * share
    return found


def pieces_of(schedule: Mapping[str, Any], role: str, key: str) -> Pieces | None:
    """The schedule of lr, weight_decay or momentum for a role: its own, or that of all roles."""
    return (schedule.get(role) or {}).get(key) or schedule.get(key)


def value_at(step: int, pieces: Pieces, planned_steps: int, level: float) -> float:
    """The value of a schedule in a step (from 0). level: where nothing is scheduled, 1 or the table's momentum."""
    for start, end, first, last, piece in spans(pieces, planned_steps, level):
        if step < end:
            return last + (first - last) * fall((end - step) / (end - start), piece)
        level = last
    return level


def spans(
    pieces: Pieces, planned_steps: int, level: float
) -> Iterator[tuple[float, float, float, float, dict[str, Any]]]:
    """Each piece with its start and end [steps], and the values that it goes from and to. Both are by default what the
    piece before ended at, or level."""
    start = 0.0
    for piece in pieces:
        end, first, level = position(piece["until"], planned_steps), piece.get("from", level), piece.get("to", level)
        yield start, end, first, level, piece
        start = end


def position(until: int | float, planned_steps: int) -> float:
    """The end of a piece [steps]: a whole number is a step, any other a share of the planned ones."""
    return float(until if isinstance(until, int) else until * planned_steps)


def fall(left: float, piece: Mapping[str, Any]) -> float:
    """From 1 to 0 while what is left of a piece goes from 1 to 0."""
    shape = piece.get("shape", "linear")
    if shape == "cosine":
        return math.sin(math.pi / 2 * left) ** 2
    if shape == "sqrt":
        return 1 - math.sqrt(1 - left)
    return left ** piece["exponent"] if shape == "power" else left


def flat_then_linear(
    step: int, planned_steps: int, warmup_steps: int, cooldown_frac: float, final_lr_frac: float
) -> float:
    """The short form's share of the peak lr: linear warm-up, flat, linear cooldown."""
    remaining, floor = 1 - step / planned_steps, final_lr_frac
    share = 1.0 if remaining >= cooldown_frac else floor + (1 - floor) * remaining / cooldown_frac
    return share * min(1.0, (step + 1) / max(1, warmup_steps))


def needs_short_form(schedule: Mapping[str, Any]) -> bool:
    """Whether the lr of some role has no pieces."""
    return not all(pieces_of(schedule, role, "lr") for role in ROLES)


# ---- what a track may declare ----


def checked_pieces(value: Any, key: str, label: str) -> Pieces:
    """A schedule of lr, weight_decay or momentum as a track gives it, its values as floats. label: for messages.

    Raises:
        ValueError: another type, an unknown key, or a number out of its bounds.
    """
    if not isinstance(value, list) or not all(isinstance(piece, dict) for piece in value):
        raise ValueError(f"{label} must be a list as [{{until = 0.6}}, {{until = 1.0, to = 0.0}}], got {shown(value)}")
    if not 1 <= len(value) <= MOST_PIECES:
        raise ValueError(f"{label} must have 1 to {MOST_PIECES} pieces, got {len(value)}")
    return [checked_piece(piece, key, f"{label} piece {number}") for number, piece in enumerate(value, 1)]


def checked_piece(piece: dict[str, Any], key: str, label: str) -> dict[str, Any]:
    known = ("until", "from", "to", "shape", "exponent")
    for name in piece:
        if name not in known:
            hint = f"{suggest(name, known)}; known: {', '.join(known)}"
            raise ValueError(f"{label} has an unknown key {shown(name)}{hint}")
    if "until" not in piece:
        raise ValueError(f"{label} lacks until: a step, or a float that is a share of the planned steps")
    until, shape, found = piece["until"], piece.get("shape", "linear"), dict(piece)
    if not (type(until) is int and 1 <= until <= MOST_STEPS) and not (type(until) is float and 0 < until <= 1):
        wanted = f"a whole number of steps from 1 to {MOST_STEPS}, or a float in (0, 1]: a share of the planned"
        raise ValueError(f"{label}: until must be {wanted}, got {shown(until)}")
    wanted = "in [0, 1)" if key == "momentum" else "in [0, 1]: a share of the value in the optimizer's table"
    for name in ("from", "to"):
        if name in piece:
            number = piece[name]
            if type(number) not in (int, float) or not 0 <= number <= 1 or (key == "momentum" and number == 1):
                raise ValueError(f"{label}: {name} must be {wanted}, got {shown(number)}")
            found[name] = float(number)
    if shape not in SHAPES:
        raise ValueError(f"{label}: shape must be {', '.join(SHAPES[:-1])} or {SHAPES[-1]}, got {shown(shape)}")
    if ("exponent" in piece) != (shape == "power"):
        raise ValueError(f'{label} must have exponent with shape = "power", and with no other')
    if shape == "power":
        exponent = piece["exponent"]
        if type(exponent) not in (int, float) or not 0 < exponent <= LARGEST_EXPONENT:
            raise ValueError(f"{label}: exponent must be in (0, {LARGEST_EXPONENT:g}], got {shown(exponent)}")
        found["exponent"] = float(exponent)
    return found


def check_spans(pieces: Pieces, planned_steps: int, label: str) -> None:
    """Raise ValueError for pieces that are not one behind the other, or go on behind the planned steps."""
    for number, (start, end, _, _, piece) in enumerate(spans(pieces, planned_steps, 0.0), 1):
        until = f"{label} piece {number}: until = {piece['until']}"
        if end > planned_steps:
            raise ValueError(f"{until} is beyond the {planned_steps} steps that are planned; lower it")
        if end <= start:
            raise ValueError(f"{until} is step {end:g}, not after step {start:g}, where the piece before ends")


def highest(pieces: Pieces, planned_steps: int, steps: int) -> float:
    """The highest share that a schedule of lr has in the steps that are run, its pieces' ends included."""
    found = spans(pieces, planned_steps, 1.0)
    return max(max(first, last if end <= steps else 0.0) for start, end, first, last, _ in found if start < steps)
