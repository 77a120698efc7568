"""Neurons of a run's MLPs at some of its validations: what the last update did to them, and which are dead.

All of it off the clock, on weights, momentum and activations that are only read. Each rank looks at the matrices whose
momentum it holds; only the numbers are gathered.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import aurora
from aurora.config import Config
from aurora.optim.fsdp import is_dtensor
from aurora.optim.telemetry import (
    applied_update,
    copy_of,
    layer_event,
    matrix_event,
    momentum_of,
    new_streaks,
    seen_by_rule,
)
from aurora.trainer.ranks import Ranks

if TYPE_CHECKING:
    from train_gpt import GPT

TOKENS = 2048  # of the validation tokens, from the first: whole sequences, at least one


class Neurons:
    """The telemetry of one run.

    steps: after which it measures: the validations at multiples of eval.every, and the last. Which neurons
    were dead before, and for how long rows had low leverage, is not kept over a resume.
    """

    def __init__(
        self, config: Config, validation_steps: Iterable[int], model: "GPT", rule: torch.optim.Optimizer, ranks: Ranks
    ):
        """rule: the optimizer of the matrices."""
        last, every = config.train.steps, config.eval.every
        is_on = config.eval.telemetry
        self.steps = {step for step in validation_steps if is_on and step > 0 and (step % every == 0 or step == last)}
        self.num_tokens = max(1, min(TOKENS, config.eval.tokens) // config.model.seq_len) * config.model.seq_len
        self.model, self.rule, self.ranks = model, rule, ranks
        first = rule.param_groups[0]  # others of its role are of optimizers that have split the matrices
        groups = [group for group in rule.param_groups if group.get("role") == first.get("role")]
        self.group_of = {p: group for group in groups for p in group["params"]}
        blocks = enumerate(getattr(model, "blocks", []))
        mlps = {f"blocks.{i}.mlp": block.mlp for i, block in blocks if hasattr(block, "mlp")}
        # By name: an edited MLP may lack some, or be made of other layers.
        self.matrices = {
            f"{mlp_name}.{name}": layer.weight
            for mlp_name, mlp in mlps.items()
            for name in ("gate", "up", "down")
            if isinstance(layer := getattr(mlp, name, None), nn.Linear) and layer.weight in self.group_of
        }
        # The layers that multiply the neurons' activations, and whether these are gated.
        self.downs = {
            mlp.down: getattr(mlp, "gate", None) is not None
            for mlp in mlps.values()
            if isinstance(getattr(mlp, "down", None), nn.Linear)
        }
        if not self.matrices:
            self.steps = set()
        # Where they are split, ranks put them together and look at all of them alike.
        self.is_split = any(is_dtensor(p) for p in self.matrices.values())
        self.own = {
            name: p
            for i, (name, p) in enumerate(self.matrices.items())
            if self.is_split or self._owner(i, p) == ranks.rank
        }
        self.before: dict[str, tuple[Tensor, Tensor | None]] = {}
        self.streaks: dict[str, Tensor] = {}
        self.dead_before: dict[nn.Module, Tensor] | None = None

    def _owner(self, index: int, p: Tensor) -> int:
        if isinstance(self.rule, aurora.MatrixOptimizer):
            return self.rule.owner_of(p)
        return index % self.ranks.world_size

    @torch.no_grad()
    def before_update(self) -> None:
        """Keep weights and momentum, to see what the next update does to them."""
        self.before = {name: (p.detach().clone(), copy_of(momentum_of(self.rule, p))) for name, p in self.own.items()}

    @torch.no_grad()
    def measure(self, step: int, inputs_BT: Tensor, targets_BT: Tensor) -> dict[str, Any]:
        """The event of this step; before_update() must have been called before its update. Collective.

        inputs_BT, targets_BT: validation tokens; the main rank runs the model on them.
        """
        own = {name: self._matrix(name, p) for name, p in self.own.items()}
        self.before = {}
        layers = self._layers(inputs_BT, targets_BT) if self.ranks.is_main or self.is_split else []
        found: dict[str, dict[str, Any]] = {}
        for part in self.ranks.all_gather_object(own):
            found |= part
        widths = {name: p.size(int(name.endswith("down"))) for name, p in self.matrices.items()}
        event = {"event": "neurons", "step": step, "tokens": inputs_BT.numel(), "width": next(iter(widths.values()))}
        if layers and not any(self.downs.values()):  # shares of all neurons; made for ReLU^2
            count = sum(down.in_features for down in self.downs)
            event |= {key: sum(layer[key] for layer in layers) / count for key in ("dead", "silent")}
        if rows := [name for name in found if not name.endswith("down")]:  # shares of the rows of up (and gate)
            count = sum(widths[name] for name in rows)
            keys = ["starved"]
            if found[rows[0]]["low_leverage"] is not None:  # a rule may keep no momentum
                keys.append("low_leverage")
            event |= {key: sum(found[name][key] for name in rows) / count for key in keys}
        return event | {"layers": layers, "matrices": {name: found[name] for name in self.matrices}}

    def _matrix(self, name: str, p: Tensor) -> dict[str, Any]:
        """Of the applied update, without its decay, of what the rule saw, and of weights, with neurons as rows."""
        group = self.group_of[p]
        tensors: list[Any] = [*self.before[name], p, momentum_of(self.rule, p)]
        if self.is_split:
            tensors = [X if X is None else X.full_tensor() for X in tensors]
        weights, average, p, momentum = tensors
        update = applied_update(weights, p, group, self.rule)
        seen = seen_by_rule(average, momentum, group, self.rule)
        if name.endswith("down"):
            update, p, seen = update.T, p.T, seen if seen is None else seen.T
        return matrix_event(update, p, seen, self.streaks.setdefault(name, new_streaks(update)))

    def _layers(self, inputs_BT: Tensor, targets_BT: Tensor) -> list[dict[str, Any]]:
        """Of each MLP, what its down-projection multiplies, seen by a hook while the model itself runs once."""
        dead_now: dict[nn.Module, Tensor] = {}
        layers: dict[nn.Module, dict[str, Any]] = {}

        def measure(down: nn.Linear, args: tuple[Tensor]) -> None:
            (activations,) = args
            event, dead = layer_event(activations, down.weight, self.downs[down])
            dead_now[down] = dead
            still_dead = int((dead & self.dead_before[down]).sum()) if self.dead_before else None
            layers[down] = {"dead": event["dead"], "still_dead": still_dead, "silent": event["silent"]}

        hooks = [down.register_forward_pre_hook(measure) for down in self.downs]
        self.model.eval()
        try:
            if hasattr(self.model, "trunk") and not self.is_split:  # without the loss, which takes much memory
                self.model.trunk(inputs_BT)
            else:
                self.model(inputs_BT, targets_BT)
        finally:
            self.model.train()
            for hook in hooks:
                hook.remove()
        self.dead_before = dead_now
        return list(layers.values())
