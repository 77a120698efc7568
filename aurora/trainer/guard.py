"""What ends a run early: numbers that are not finite, ranks whose weights differ, and the wish to stop."""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from aurora.errors import Exit, HarnessError
from aurora.fast.mirror import strange_parts
from aurora.optim.fsdp import local
from aurora.optim.stacks import gradients_of
from aurora.trainer.ranks import Ranks, digest
from aurora.trainer.stops import stops


class Guard:
    """Each step, on all ranks at once: are loss, gradients, their sums over ranks and the update before finite, and was
    a stop asked for?

    The answer is found on the device and, on CUDA, read one step later, so that the host never waits for it; a
    non-finite step is reported before anything more is measured or saved. Ranks reduce whole numbers with MIN: a MAX
    over norms can lose a NaN.
    """

    def __init__(self, model: nn.Module, ranks: Ranks, is_split: bool = False):
        """is_split: whether each rank holds rows of the weights, and of sums of gradients."""
        self.model, self.is_split = model, is_split
        self.names, self.params = zip(*model.named_parameters(), strict=True)
        self.ranks = ranks
        self.must_stop = False  # agreed upon by all ranks
        # Of a bad parameter and the rank that has it; MIN gives the first parameter on the first rank.
        self.codes = torch.arange(len(self.params), device=ranks.device) * ranks.world_size + ranks.rank
        self.zero = torch.zeros((), device=ranks.device)
        self.found: list[Tensor] = []
        self.no_resume = ""  # see Run
        self.must_stay_unedited = False  # for a fast forward pass trains it, which would not see a change
        self.pending: list[tuple[int, Tensor, torch.cuda.Event | None]] = []

    def stop_if_asked(self, step: int) -> None:
        """Raise HarnessError PREEMPTED once all ranks have agreed to stop; the checkpoint must be saved by then."""
        if self.must_stop and self.no_resume:
            message = f"at step {step}, without a checkpoint, for the optimizer is not resumable; start anew"
            raise HarnessError(Exit.PREEMPTED, message)
        if self.must_stop:
            raise HarnessError(Exit.PREEMPTED, f"at step {step}; the same command with --resume goes on")

    def first_bad(self) -> Tensor:
        """Code of the first parameter here whose gradient is not finite, or more than any code."""
        found = iter(torch._foreach_norm([local(grad) for grad in gradients_of(self.params)]))
        norms = torch.stack([self.zero if p.grad is None else next(found).float() for p in self.params])
        return torch.where(norms.isfinite(), len(self.params) * self.ranks.world_size, self.codes).min()

    def observe(self, loss: Tensor) -> None:
        """Call after backward, before gradients are summed over ranks: then nothing would tell whose was bad."""
        are_parts = self.ranks.world_size > 1 and not self.is_split
        self.found = [loss.isfinite().long(), *([self.first_bad()] if are_parts else [])]

    def check(self, step: int, rule: torch.optim.Optimizer) -> None:
        """Call after observe(), when all is ready for the update.

        Args:
            rule: the matrix optimizer, whose found_non_finite tells of the updates so far, if it has one.

        Raises:
            HarnessError: NON_FINITE, naming step, parameter and rank; on CUDA one step late.
        """
        bad_update = getattr(rule, "found_non_finite", None)
        # torch.full fills on the device; torch.tensor would copy from the host and wait for it.
        go_on = torch.full((), not stops.is_asked, device=self.ranks.device, dtype=torch.int64)
        update_is_finite = torch.ones_like(go_on) if bad_update is None else (~bad_update).long()
        flags = torch.stack([go_on, update_is_finite, self.first_bad(), *self.found])
        status = self.ranks.all_reduce(flags, dist.ReduceOp.MIN)
        event = None
        if self.ranks.device.type == "cuda":
            status = status.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self.pending.append((step, status, event))
        self.read(keep=0 if event is None else 1)

    def read(self, keep: int = 0) -> None:
        """Act on all but the newest keep answers."""
        while len(self.pending) > keep:
            step, status, event = self.pending.pop(0)
            if event is not None:
                event.synchronize()
            go_on, update_is_finite, first_bad_sum, loss_is_finite, *first_bad_part = status.tolist()
            self.must_stop |= not go_on
            world_size = self.ranks.world_size
            first_bad = min([first_bad_sum, *first_bad_part])
            if first_bad >= len(self.names) * world_size and loss_is_finite and update_is_finite:
                continue
            where = "gradients are finite"
            for code, what in [(first_bad_sum, "sum of gradients" if first_bad_part else "gradient"),
                               *((code, "gradient") for code in first_bad_part)]:  # fmt: skip
                index, rank = divmod(code, world_size)
                if index < len(self.names):
                    where = f"first bad {what}: {self.names[index]}" + f" on rank {rank}" * (world_size > 1)
            loss_text = "loss is finite" if loss_is_finite else "loss is not finite"
            where += "" if update_is_finite else f", the update of step {step} was not finite"
            raise HarnessError(Exit.NON_FINITE, f"step {step + 1}: {loss_text}, {where}; lower the learning rate")

    def check_weights(self, step: int) -> None:
        """Before weights are validated or saved: are they equal on all ranks, finite, and the model's own? Collective.

        Raises:
            HarnessError: RANKS_DISAGREE, NON_FINITE, or CONFIG where the model was patched or hooked meanwhile.
        """
        if self.must_stay_unedited:
            self.ranks.all_or_none(lambda: check_still_unedited(step, self.model))
        if self.ranks.world_size > 1 and not self.is_split:
            self.ranks.check_agree(weights=digest(self.model.state_dict()))

        def check() -> None:
            bad = next((name for name, p in self.model.named_parameters() if not local(p).isfinite().all()), None)
            if bad:
                message = f"step {step}: after the update {bad} is not finite; lower the learning rate"
                raise HarnessError(Exit.NON_FINITE, message)

        self.ranks.all_or_none(check) if self.is_split else check()


def check_still_unedited(step: int, model: nn.Module) -> None:
    """Raise HarnessError for a model that was patched or hooked while a fast forward pass trains it."""
    for finding in strange_parts(model):
        message = f"step {step}: {finding} since training began, which the fast forward pass does not see"
        raise HarnessError(Exit.CONFIG, f"{message}; change the model before prepare()")


def check_validation(step: int, val_loss: float, vocab_size: int, is_edited: bool) -> None:
    """Raise HarnessError for a loss that cannot be. Equal on all ranks, and so is this.

    is_edited: whether the model is another than the public benchmark's, whose head begins with zeros.
    """
    if not math.isfinite(val_loss):
        message = f"step {step}: validation loss is {val_loss}, weights are finite; lower the learning rate"
        raise HarnessError(Exit.NON_FINITE, message)
    uniform = math.log(vocab_size)
    if step == 0 and not is_edited and abs(val_loss - uniform) > 1e-3:
        message = f"before training the loss is {val_loss}, but a head of zeros gives ln V = {uniform:.6f}"
        raise HarnessError(Exit.CONFIG, f"{message}; the model or the validation is broken")
