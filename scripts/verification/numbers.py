"""Checks of what a run measured: at which steps, times, learning rates, losses and the end event."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

from aurora.schedule import pieces_of, settings_at
from aurora.trainer.cost import speed_of
from aurora.trainer.record import Validation, first_at_target
from scripts.verification.events import OTHER_STACK_TOLERANCE, Events, stack_of
from scripts.verification.external import LR_TOLERANCE, is_external

# FLOP/s that no device of its kind reaches: above a B200's dense bfloat16, and a core with matrix units.
PEAK_FLOPS = {"cuda": 3e15, "mps": 1e14, "cpu": 2e12}
UNTRAINED_TOLERANCE = 0.05  # of the loss at step 0, from ln(vocab_size): the head starts at zero


def check_order(run: Events) -> Iterator[str]:
    kinds = [event["event"] for event in run.rest]
    unknown = set(kinds) - {"val", "train", "neurons", "resume", "end"}
    if unknown:
        yield f"events of unknown kinds: {sorted(map(str, unknown))}"
    for kind, following in itertools.pairwise(kinds):
        if kind == "end" and following != "resume":
            yield f"an end event is followed by a {following} event"
    stacks = {stack_of(segment) for segment in (run.start, *(e for e in run.rest if e["event"] == "resume"))}
    # Kernels of a GPU add in any order.
    tolerance = OTHER_STACK_TOLERANCE if len(stacks) > 1 or run.start["device"] != "cpu" else 0.0
    seen: dict[int, float] = {}
    last, furthest = {"val": -1, "train": -1, "neurons": -1}, run.lost_steps
    for event in run.rest:
        kind = event["event"]
        if event["step"] > run.config["train"]["steps"]:
            yield f"{kind} event of step {event['step']}, beyond the end of the run"
        if kind == "resume":
            if event["step"] > furthest:
                yield f"resumed from step {event['step']}, to which the run had not come"
            last = dict.fromkeys(last, -1)
        if kind not in last:
            continue
        step = event["step"]
        if step <= last[kind]:
            yield f"{kind} event of step {step} stands after that of step {last[kind]}"
        last[kind], furthest = step, max(furthest, step)
        if kind == "val":
            before = seen.setdefault(step, event["val_loss"])
            if abs(before - event["val_loss"]) > tolerance:
                yield f"step {step} was run twice, with val_loss {before} and {event['val_loss']}"


def notes_on_order(run: Events) -> Iterator[str]:
    """Validations that a resume undid and that came out otherwise the second time, by as much as stacks may differ."""
    seen: dict[int, float] = {}
    for event in run.rest:
        if event["event"] == "val" and seen.setdefault(event["step"], event["val_loss"]) != event["val_loss"]:
            yield f"step {event['step']} was run twice, with val_loss {seen[event['step']]} and {event['val_loss']}"


def declared_validations(config: dict[str, Any]) -> set[int]:
    """The trainer's rule for the steps after which loss is measured."""
    steps, validations = config["train"]["steps"], config["eval"]
    if not 0 < steps < 10**6 or validations["every"] < 1 or validations["late_every"] < 1:
        raise ValueError(
            f"{steps} steps with validations every {validations['every']} and {validations['late_every']} cannot be"
        )
    late_from = (1 - validations["late_frac"]) * steps
    return {s for s in range(steps) if s % validations["every" if s < late_from else "late_every"] == 0} | {steps}


def check_validations(run: Events) -> Iterator[str]:
    declared, steps = declared_validations(run.config), {event["step"] for event in run.of("val")}
    ends = run.of("end")
    last = run.config["train"]["steps"] if ends and ends[-1]["status"] == "done" else max(steps, default=-1)
    if ends and ends[-1]["status"] == "done" and ends[-1]["step"] != last:
        yield f"done at step {ends[-1]['step']}, but the config plans {last} steps"
    first = run.lost_steps + 1 if run.lost_steps else 0
    extra, missing = steps - declared, {step for step in declared if first <= step <= last} - steps
    if extra:
        yield f"validated at steps that the config does not declare: {sorted(extra)[:5]}"
    if missing:
        yield f"not validated at declared steps: {sorted(missing)[:5]}"
    for event in run.of("val"):
        if event["tokens"] != event["step"] * run.config["train"]["batch_tokens"]:
            yield f"step {event['step']}: tokens {event['tokens']} are not step x batch_tokens"


def declared_logs(run: Events) -> set[int]:
    """The trainer's rule for the steps of train events: at every flush, and each log_every steps since the one before.

    It flushes at validations, checkpoints and stops.
    """
    declared, train, ends = declared_validations(run.config), run.config["train"], run.of("end")
    validations, stops = ([event["step"] for event in run.of(kind)] for kind in ("val", "resume"))
    last = ends[-1]["step"] if ends and ends[-1]["status"] in ("done", "interrupted") else max(validations, default=0)
    last = min(last, train["steps"])
    saves = range(0, train["steps"], train["checkpoint_every"]) if train["checkpoint_every"] else ()
    windows = itertools.pairwise(sorted(step for step in {0, last, *stops, *saves, *declared} if 0 <= step <= last))
    logged = {step for low, high in windows for step in (*range(low, high, train["log_every"]), high)}
    return {step for step in logged if step > run.lost_steps}


def check_logs(run: Events) -> Iterator[str]:
    if missing := declared_logs(run) - {event["step"] for event in run.of("train")}:
        yield f"no train event at steps where one is due: {sorted(missing)[:5]}"


def check_times(run: Events) -> Iterator[str]:
    validations, trains = run.of("val"), run.of("train")
    by_step = {event["step"]: event for event in validations}
    times = [by_step[step]["train_time_s"] for step in sorted(by_step)]
    if typed := [seconds for seconds in times if not is_clock(seconds)]:
        yield f"train_time_s {typed[0]} is no whole number of nanoseconds: typed in"
    if any(later <= earlier for earlier, later in itertools.pairwise(times)) or (times and times[0] < 0):
        yield "train_time_s does not rise from validation to validation"
    step_ms = [event["step_ms"] for event in trains]
    if len(step_ms) >= 3 and len(set(step_ms)) < len(step_ms) / 2:
        yield "step times repeat: no clock gives them"
    if any(not 0 <= event["optimizer_ms"] <= event["step_ms"] for event in trains):
        yield "optimizer_ms is not within step_ms"
    if not validations or not trains:
        return
    previous, windows = run.lost_steps, []
    for event in trains:
        windows.append((event["step"], (event["step"] - previous) * event["step_ms"] / 1000))
        previous = event["step"]
    # Between two validations the clock sees the steps and little else.
    for early, late in itertools.pairwise(sorted(by_step)):
        inside = [seconds for step, seconds in windows if early < step <= late]
        elapsed = by_step[late]["train_time_s"] - by_step[early]["train_time_s"]
        # 50 ms, since a process may lose its core between two readings of the clock.
        if late in {step for step, _ in windows} and not 0.8 * elapsed - 0.05 <= sum(inside) <= 1.02 * elapsed + 0.05:
            yield f"steps {early} to {late} took {sum(inside):.3f} s by their step_ms, {elapsed:.3f} s by train_time_s"
    counts = run.start["params_by_role"]
    flop = 6 * (counts["matrix"] + counts["head"]) * run.config["train"]["batch_tokens"]
    floor_ms = 1000 * flop / max(map(peak_flops, (run.start, *run.of("resume"))))
    if min(step_ms) < floor_ms:
        yield f"a step of {min(step_ms):.4g} ms is below the {floor_ms:.4g} ms that its FLOP take at best"


def peak_flops(segment: dict[str, Any]) -> float:
    """Of all ranks of a run or resume event."""
    cores = segment["env"]["cpu_count"] if segment["device"] == "cpu" else 1
    return PEAK_FLOPS[segment["device"]] * segment["world_size"] * cores


def check_scheduled(run: Events) -> Iterator[str]:
    """What each train event says of lr and of all that has pieces, against the schedule."""
    config, groups = run.config, run.start["param_groups"]
    # Of the lrs the trainer logs that of its rule's first group, the matrices, by itself.
    first = next((group for group in groups if group["role"] == "matrix"), groups[0])
    terms = config["schedule"], config["train"]["steps"], config["warmup_steps"]
    tolerance = LR_TOLERANCE if is_external(run.start) else 1e-12
    for event in run.of("train"):
        settings = [(group, settings_at(event["step"] - 1, group, *terms)) for group in groups]
        lr = next(values["lr"] for group, values in settings if group is first)
        wanted = {  # of groups of one role, which an optimizer of others may have, the last
            f"{group['role']}.{key}": value
            for group, values in settings
            for key, value in values.items()
            if pieces_of(config["schedule"], group["role"], key) and not (key == "lr" and group is first)
        }
        found = event.get("scheduled", {})
        if unlike := sorted(found.keys() ^ wanted.keys()):
            has = "has" if unlike[0] in found else "lacks"
            yield f"step {event['step']}: scheduled {has} {unlike[0]}, unlike the schedule"
            return
        pairs = {"lr": (event["lr"], lr)} | {key: (found[key], value) for key, value in wanted.items()}
        for key, (value, scheduled) in pairs.items():
            if not math.isclose(value, scheduled, rel_tol=tolerance, abs_tol=1e-15):
                yield f"step {event['step']}: {key} {value} is not the schedule's"
                return


def check_losses(run: Events) -> Iterator[str]:
    config, validations = run.config, run.of("val")
    for event in validations:
        if not is_float32_sum(event["val_loss"], config["eval"]["tokens"], config["model"]["seq_len"]):
            yield f"step {event['step']}: val_loss {event['val_loss']} is no sum of float32 over the tokens: typed in"
            break
    untrained = math.log(config["model"]["vocab_size"])
    first = validations[0] if validations and validations[0]["step"] == 0 and not run.is_edited else None
    if first and abs(first["val_loss"] - untrained) > UNTRAINED_TOLERANCE:
        yield f"step 0: val_loss {first['val_loss']} is not the {untrained:.4f} of an untrained model"
    # train_loss is a mean over the steps before a validation. While it falls fast, the validation is nearer to the mean
    # after it, or, where there is none, to what the fall so far lets expect.
    train_losses = {event["step"]: event["train_loss"] for event in run.of("train")}
    before = [validations[0]["val_loss"] if validations else untrained, *train_losses.values()]
    expected = [2 * now - earlier for earlier, now in itertools.pairwise(before)][-1:]
    lows = dict(zip(train_losses, [*before[2:], *expected], strict=True))
    for event in validations[1:]:
        near = train_losses.get(event["step"])
        # The mean over a first window in which losses rose above an untrained model's says nothing of its end.
        if near is None or (event["step"] == min(train_losses) and near > untrained):
            continue
        if event["val_loss"] < 0.75 * min(near, lows[event["step"]]) - 0.05:
            yield f"step {event['step']}: val_loss {event['val_loss']} is too far below train_loss {near}"


def is_float32_sum(mean: float, tokens: int, seq_len: int) -> bool:
    """Whether mean x tokens is a sum of float32 sums over whole sequences, as the trainer makes it."""
    if not 0 < mean < 1e3 or not 0 < tokens < 2**40:
        return False
    # A sequence's sum has 24 bits; its mean lies within a factor 64 of the overall one.
    grain = 2.0 ** (math.floor(math.log2(mean * seq_len / 64)) - 23)
    return round(mean * tokens / grain) * grain / tokens == mean


def notes_on_losses(run: Events) -> Iterator[str]:
    """What is strange, and proves nothing."""
    for event in run.of("train"):
        if not is_float32_mean(event["train_loss"], run.config["train"]["log_every"]):
            yield f"step {event['step']}: train_loss {event['train_loss']} is no mean of float32 losses: typed in?"
            return


def is_float32_mean(mean: float, most: int) -> bool:
    """Whether this is a mean of so many float32 losses at most, of which none is below a 64th of it."""
    if mean <= 0:
        return mean == 0
    grain = 2.0 ** (math.floor(math.log2(mean / 64)) - 23)
    return any(round(mean * count / grain) * grain / count == mean for count in range(1, min(most, 10_000) + 1))


def is_clock(seconds: float) -> bool:
    """Whether these are seconds of a clock that counts nanoseconds."""
    return round(seconds * 1e9) / 1e9 == seconds


def check_end(run: Events) -> Iterator[str]:
    ends, validations = run.of("end"), {event["step"]: event for event in run.of("val")}
    if not ends:
        return
    end, target = ends[-1], run.config["eval"]["target"]
    order = [
        Validation(step, validations[step]["val_loss"], validations[step]["train_time_s"])
        for step in sorted(validations)
    ]
    hit, last = first_at_target(order, target), order[-1] if order else None
    expected = {
        "val_loss": last.val_loss if last else None,
        "reached_target": hit is not None,
        "steps_to_target": hit.step if hit else None,
        "time_to_target_s": hit.train_time_s if hit else None,
    }
    is_lost = run.lost_steps > 0 and end["steps_to_target"] is not None and end["steps_to_target"] <= run.lost_steps
    for key, value in expected.items():
        if end[key] != value and not (last is None if key == "val_loss" else is_lost):
            yield f"end event: {key} is {end[key]}, by the validations {value}"
    if end["status"] == "done" and last and end["train_time_s"] != last.train_time_s:
        yield f"end event: train_time_s is {end['train_time_s']}, at the last validation {last.train_time_s}"
    if last and (end["train_time_s"] < last.train_time_s or end["step"] < last.step):
        yield f"end event: step {end['step']} after {end['train_time_s']} s is before the last validation"
    if any(not 0 <= seconds < 1e9 or not is_clock(seconds) for seconds in end["untimed"].values()):
        yield "end event: untimed seconds cannot be"
    spent_s = end["train_time_s"] + sum(end["untimed"].values())
    if not math.isclose(end.get("wall_s", spent_s), spent_s, rel_tol=1e-6):
        yield f"end event: wall_s is {end['wall_s']}, train_time_s and untimed add up to {spent_s}"
    # A process that was killed before it saved anything has the number of the one after it.
    resumed = sorted({event["segment"] for event in run.of("resume")})
    first = max(2, resumed[0]) if run.lost_steps else 2
    if resumed != list(range(first, first + len(resumed))) or end["segments"] != first - 1 + len(resumed):
        yield f"end event: {end['segments']} segments, the resumed ones are {resumed}"
    if end.get("data_wait_s", 0) > spent_s:
        yield f"end event: data_wait_s {end['data_wait_s']} is more than all of the run took"
    if "tokens_per_s" in end:
        speed = speed_of(end["step"], end["train_time_s"], end["segments"], run.start)
        for key, value in speed._asdict().items():
            if end.get(key) != value:
                yield f"end event: {key} is {end.get(key)}, by steps, seconds and FLOP {value}"
