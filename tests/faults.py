"""Makes a run fail at a place of its timeline, from outside: SPEEDRUN_FAULT="KIND:PLACE:STEP[:RANK]".

    kill, stop, term   SIGKILL, SIGSTOP or SIGTERM to the process of that rank (0 if not named)
    hang, sleep        wait for ever, or half a second
    full               OSError: no space left on device
    nan, inf, ulp      put that value into a number of the run, or move it to the next float; PLACE is then one of
                       loss, gradient (of this rank), sum (of gradients), updated (weights)

It happens the first time, and in the first attempt of scripts/launch.sh alone.
"""

import contextlib
import errno
import os
import signal
import time

from aurora.trainer.timeline import timeline

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}


def from_environment(rank):
    """(kind, place, step) of the fault of this rank, or None."""
    kind, *place = os.environ.get("SPEEDRUN_FAULT", "").split(":")
    is_first_attempt = os.environ.get("SPEEDRUN_ATTEMPT", "0") == "0"
    is_here = bool(place) and int([*place, "0"][2]) == rank and is_first_attempt
    return (kind, place[0], int(place[1])) if is_here else None


def subscribe(rank):
    """Let this process fail at a mark."""
    fault = from_environment(rank)
    if fault is None or fault[0] in ("nan", "inf", "ulp"):
        return
    kind, *place = fault
    done = []

    def at(name, step):
        if [name, step] == place and not done:
            done.append(True)
            fail(kind)

    timeline.subscribe(at)


def fail(kind):
    if kind in SIGNALS:
        os.kill(os.getpid(), SIGNALS[kind])
    elif kind in ("hang", "sleep"):
        time.sleep(1e6 if kind == "hang" else 0.5)
    elif kind == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    else:
        raise ValueError(f"SPEEDRUN_FAULT: no kind {kind!r}")


def corrupt_numbers(rank, train_gpt):
    """Let a number of this process's run be wrong, where the fault says so."""
    fault = from_environment(rank)
    if fault is None or fault[0] not in ("nan", "inf", "ulp"):
        return
    import torch

    kind, what, at_step = fault
    done, prepare = [], train_gpt.prepare

    @torch.no_grad()
    def corrupt(tensor):
        first = tensor.view(-1)[:1]
        first.copy_(torch.nextafter(first, first + 1) if kind == "ulp" else torch.full_like(first, float(kind)))
        done.append(True)

    def is_due():
        return timeline.place.step == at_step and not done

    def prepare_and_corrupt(run, forward_backward):
        model = prepare(run, forward_backward)
        finish = run.gradients.finish

        def wrong_loss(*batch):
            loss = model(*batch)
            if is_due() and torch.is_grad_enabled():
                done.append(True)
                return loss + float(kind)  # its gradients are right
            return loss

        def wrong_sum():
            finish()
            if is_due():
                corrupt(next(p.grad for p in run.rule.param_groups[0]["params"] if p.grad is not None))

        def at(name, step):
            if (what, name) == ("gradient", "micro_step") and is_due():
                corrupt(next(run.model.parameters()).grad)
            elif what == name == "updated" and is_due():
                corrupt(next(run.model.parameters()))

        timeline.subscribe(at)
        if what == "sum":
            run.gradients.finish = wrong_sum
        return wrong_loss if what == "loss" else model

    train_gpt.prepare = prepare_and_corrupt


@contextlib.contextmanager
def telling(subscriber):
    """Within, the subscriber is told of every mark."""
    unsubscribe = timeline.subscribe(subscriber)
    try:
        yield
    finally:
        unsubscribe()
