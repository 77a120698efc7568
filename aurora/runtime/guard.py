"""The check of every step: are its numbers finite on all ranks, and was the run asked to stop?"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from aurora.runtime.ranks import Ranks
from configs.schema import Exit, HarnessError


class Guard:
    """Each step, on all ranks at once: are loss, gradients and the update before finite, and was a stop asked for?

    The answer is found on the device and, on CUDA, read one step later, so that the host never waits for it; a
    non-finite step is reported before anything more is measured or saved. Ranks reduce whole numbers with MIN: a MAX
    over norms can lose a NaN.
    """

    def __init__(self, model: nn.Module, ranks: Ranks):
        self.names, self.params = zip(*model.named_parameters(), strict=True)
        self.ranks = ranks
        self.stop_requested = False  # set by a signal, on some rank
        self.must_stop = False  # agreed upon by all ranks
        # Of a bad parameter and the rank that has it; MIN gives the first parameter on the first rank.
        self.codes = torch.arange(len(self.params), device=ranks.device) * ranks.world_size + ranks.rank
        self.pending: list[tuple[int, Tensor, torch.cuda.Event | None]] = []

    def request_stop(self) -> None:
        self.stop_requested = True

    def check(self, step: int, loss: Tensor, bad_update: Tensor | None = None) -> None:
        """Call between backward and update. Raises HarnessError naming step, parameter and rank; on CUDA one step late.

        Args:
            bad_update: the optimizer's found_non_finite so far, a 0-dim bool.
        """
        norms = torch.stack(torch._foreach_norm([p.grad for p in self.params]))
        first_bad = torch.where(norms.isfinite(), len(self.params) * self.ranks.world_size, self.codes).min()
        # torch.full fills on the device; torch.tensor would copy from the host and wait for it.
        go_on = torch.full((), not self.stop_requested, device=self.ranks.device, dtype=torch.int64)
        update_is_finite = torch.ones_like(go_on) if bad_update is None else (~bad_update).long()
        flags = torch.stack([first_bad, loss.isfinite().long(), update_is_finite, go_on])
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
            first_bad, loss_is_finite, update_is_finite, go_on = status.tolist()
            self.must_stop |= not go_on
            index, rank = divmod(first_bad, self.ranks.world_size)
            is_bad_gradient = index < len(self.names)
            if is_bad_gradient or not loss_is_finite or not update_is_finite:
                where = f"first bad gradient: {self.names[index]}" if is_bad_gradient else "gradients are finite"
                where += f" on rank {rank}" if is_bad_gradient and self.ranks.world_size > 1 else ""
                loss_text = "loss is finite" if loss_is_finite else "loss is not finite"
                where += "" if update_is_finite else f", the update of step {step} was not finite"
                message = f"step {step + 1}: {loss_text}, {where}; lower the learning rate"
                raise HarnessError(Exit.NON_FINITE, message)
