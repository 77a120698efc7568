"""What all matrix optimizers share: momentum, same-shape stacks, sharding over ranks, decay, scale, state.

A rule is a subclass that overrides direction(), and new_state() if it remembers anything:

    B <- momentum B + (1 - momentum) G                       momentum buffer, kept by the matrix's owner
    X  = (1 - momentum) G + momentum B                       with nesterov, else B
    W <- (1 - lr weight_decay) W - lr scale direction(X)     scale = sqrt(max(1, M/N)) with aspect_scale, else 1

hyperball, cautious_decay and update_floor modify the last line, for any rule: see update.py.

polar(X) has spectral norm 1, so lr is in units of spectral norm per step for the polar rules.

Groups with algorithm = "adamw" are updated by torch's AdamW: one optimizer for a whole model.
"""

import collections
import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .adamw_group import ADAMW_DEFAULTS, adamw_step, check_adamw_group
from .fsdp import (
    Exchange,
    is_by_rows,
    is_dtensor,
    local,
    pipeline,
    rounds,
    shard_group,
    split_as,
)
from .loading import (
    check_arguments,
    check_foreign_settings,
    checked_state,
    copied_to,
    device_of_state,
    in_order,
    loaded_groups,
    names_of,
)
from .rule import StackedRule, step_of
from .shapes import check_shape, matrix_shapes
from .sharding import (
    GathersUnderWay,
    assign_owners,
    begin_gathers,
    complete,
    gather_states,
    polar_cost,
    sum_to_all,
    sum_to_owners,
)
from .stacks import (
    STACK_SHARE,
    gradients_of,
    group_by,
    lookahead,
    split_for_memory,
    update_momentum,
    without_autocast,
)
from .update import check_ball, is_modified, take_off


class MatrixOptimizer(StackedRule):
    """Base of the rules that update whole matrices, and of the optimizers for whole models that they are.

    A group holds matrices (see shapes.py for convolutions, experts, fused layers), or has algorithm = "adamw" and an
    lr of its own: then torch's AdamW updates it, with lr, weight_decay, betas and eps of the group.

    Without process_group every rank updates all parameters, as torch's optimizers do. With it every matrix has one
    owner among the group's ranks: step() reads its gradient on the owner alone, keeps its state there, and hands the
    new weights to all ranks. step(), reduce_gradients() and consolidate_state_dict() are then collectives. Gradients
    must already be summed (or averaged) over ranks: by DDP, or by reduce_gradients(), which sends a matrix's to its
    owner only. All ranks must hold the same weights.

    Parameters that torch's fully_shard has split need no process_group: for its update each matrix is put together on
    one owner, and ranks keep their rows of all state. step() is then a collective; see fsdp.py.

    Args:
        params: 2-D parameters, (name, parameter) pairs or parameter groups, as for any torch optimizer.
        lr: Step size; for the polar rules the spectral norm of a step, times sqrt(M/N) on tall matrices.
        weight_decay: Decoupled decay: a step multiplies W by 1 - lr * weight_decay.
        momentum: Decay of the exponential average of gradients, in [0, 1).
        nesterov: Whether the gradient is mixed into the average once more.
        aspect_scale: Whether tall updates are multiplied by sqrt(M/N).
        polar_schedule: Polynomials of the polar factor: ns5_jordan, polar_express5, quintic12, or svd, which is exact.
        polar_dtype: Dtype of the polar factor's matmuls: float32, bfloat16, or auto: bfloat16 on CUDA, the faster of
            both on a CPU, else float32.
        adjust_lr_fn: What lr is multiplied by: spectral: as aspect_scale says; original: sqrt(max(1, M/N)), Keller
            Jordan's; match_rms_adamw: 0.2 sqrt(max(M, N)), Moonshot's, which suits AdamW's lr and weight_decay.
        hyperball: Whether every matrix keeps its Frobenius norm; a step's is then lr times that, before it is undone.
        cautious_decay: Whether only those weights decay that the update moves towards zero.
        update_floor: Least Frobenius norm of an update, before lr, relative to that of its weights; 0 for none.
        process_group: whose ranks share the work; without one nothing is sharded.
        rule_hparams: for subclasses: the hyper-parameters that the rule adds.

    lr and momentum may be tensors of one element, as for torch's optimizers. A step under torch.compile is then not
    compiled again when they change.

    Raises:
        ValueError: a hyper-parameter out of range, or a parameter that its group cannot update.
    """

    # Of momentum, gradients and directions that travel between ranks under fully_shard; None: float32.
    wire_dtype: torch.dtype | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        aspect_scale: bool = True,
        polar_schedule: str = "polar_express5",
        polar_dtype: str = "auto",
        adjust_lr_fn: str = "spectral",
        hyperball: bool = False,
        cautious_decay: bool = False,
        update_floor: float = 0.0,
        process_group: Any = None,
        rule_hparams: dict[str, Any] | None = None,
        **unknown: Any,
    ):
        check_arguments(type(self).__name__, unknown)
        self.process_group = process_group
        self.owners: dict[Tensor, int] = {}  # of all matrices; 0 without process_group
        self._rank = dist.get_rank(process_group) if process_group else 0
        self._rank_loads = [0] * (dist.get_world_size(process_group) if process_group else 1)
        self._shard_loads: dict[Any, list[int]] = {}  # of the groups over whose ranks fully_shard has split matrices
        self._whole_state: dict[Tensor, Any] | None = {}  # there is none before the first step
        defaults = dict(
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            aspect_scale=aspect_scale,
            polar_schedule=polar_schedule,
            polar_dtype=polar_dtype,
            adjust_lr_fn=adjust_lr_fn,
            hyperball=hyperball,
            cautious_decay=cautious_decay,
            update_floor=update_floor,
            algorithm=type(self).__name__,
            **(rule_hparams or {}),
        )
        super().__init__(params, defaults)

    # ---- the step ----

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient. No host sync.

        A non-finite gradient makes its matrix non-finite and sets found_non_finite, a 0-dim tensor on the device that
        stays set. To keep weights whole, check gradients before the step (the trainer does).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._whole_state = None
        self._have_flags()
        gathers = GathersUnderWay()
        for group in self.param_groups:
            if group["algorithm"] == "adamw":
                adamw_step([p for p in group["params"] if p.grad is not None], self.state, group)
                continue
            self._step_by_rows([p for p in group["params"] if is_dtensor(p) and p.numel()], group)
            params = [p for p in group["params"] if not is_dtensor(p) and p.numel()]
            share = self._share(STACK_SHARE, group)
            # Equal sizes together, whatever the shape: each rank owns about as many of them.
            for same_size in group_by(params, lambda p: (p.numel(), p.dtype, p.device)):
                own = [p for p in same_size if p.grad is not None and self.owner_of(p) == self._rank]
                for same_shape in group_by(own, lambda p: (p.shape, self._steps_taken(p))):
                    for stack in split_for_memory(same_shape, same_shape[0].numel(), same_shape[0].is_cpu, share):
                        # The states are found here: torch.compile may take _update() for a step of its own, and would
                        # then remember whose they were in the first call.
                        self._update(stack, [self.state[p] for p in stack], group)
                if self._is_sharded:
                    owners = [self.owner_of(p) for p in same_size]
                    gathers.add(begin_gathers(same_size, owners, self.process_group))
        gathers.wait()
        for process_group in [*([self.process_group] if self._is_sharded else []), *self._shard_loads]:
            for flag in self._non_finite.values():
                count = flag.to(torch.int32)
                dist.all_reduce(count, group=process_group)
                flag.copy_(count > 0)
        return loss

    def _update(self, stack: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any]) -> None:
        """Update parameters of one shape, all with gradients."""
        for p, state in zip(stack, states, strict=True):
            if p.grad is not None and p.grad.layout != torch.strided:
                raise RuntimeError(
                    f"{type(self).__name__} does not take sparse gradients; give this parameter to AdamW"
                )
            if not state:
                state.update(self._new_state(p, group))
        buffers = [state["momentum_buffer"] for state in states]
        update_momentum(gradients_of(stack), buffers, group)
        with without_autocast(stack[0].device):
            O_K = self._change(stack, lambda: lookahead(gradients_of(stack), buffers, group), states, group)
        if "step" in self._inputs:
            for state in states:
                state["step"] += 1
        take_off(stack, O_K, *step_of(stack[0].shape, group))

    def _step_by_rows(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Update parameters that fully_shard has split. Collective."""
        params = [p for p in params if p.grad is not None]
        tasks = []
        for same_shape in group_by(params, lambda p: (shard_group(p), p.shape, p.dtype, p.device)):
            for p in same_shape:
                self._have_state(p, group)
            for same_steps in group_by(same_shape, self._steps_taken):
                owners = [self.owner_of(p) for p in same_steps]
                world_size = dist.get_world_size(shard_group(same_steps[0]))
                tasks += [self._round(members, group) for members in rounds(same_steps, owners, world_size)]
        pipeline(tasks)

    def _round(self, params: list[Tensor], group: dict[str, Any]) -> Iterator[None]:
        """A step of parameters of one shape: rows go to the owners, owners compute, rows of directions come back."""
        states, shape, device = [self.state[p] for p in params], params[0].shape, params[0].device
        weights, grads = [local(p) for p in params], [local(p.grad) for p in params]
        buffers = [local(state["momentum_buffer"]) for state in states]
        exchange = Exchange([self.owner_of(p) for p in params], device, shard_group(params[0]))
        keys = {key: states[0][key].shape for key in sorted(states[0]) if key not in ("momentum_buffer", "step")}
        has_weights, has_grads = "W_KMN" in self._inputs or is_modified(group), "G_KMN" in self._inputs

        update_momentum(grads, buffers, group)
        exchange.send("X_KMN", shape, list(lookahead(grads, buffers, group).unbind()), self.wire_dtype)
        if has_grads:
            exchange.send("G_KMN", shape, [grad.float() for grad in grads], self.wire_dtype)
        if has_weights:
            exchange.send("W_KMN", shape, weights)
        for key in keys:
            exchange.send(key, keys[key], [local(state[key]) for state in states])
        yield
        X, own = exchange.arrived("X_KMN"), exchange.own
        stand_ins = [torch.empty((), device=device).expand(shape) for _ in own]  # parameters of which only this is read
        if has_grads:
            for stand_in, G in zip(stand_ins, exchange.arrived("G_KMN"), strict=True):
                stand_in.grad = G
        if has_weights:
            for i, W in enumerate(exchange.arrived("W_KMN")):
                W = W.float()
                W.grad, stand_ins[i] = stand_ins[i].grad, W
        own_states = [{key: states[i][key] for key in ("step",) if key in states[i]} for i in own]
        for key in keys:
            for state, value in zip(own_states, exchange.arrived(key), strict=True):
                state[key] = value
        directions: list[Tensor] = []
        share, is_cpu = self._share(STACK_SHARE, group), device.type == "cpu"
        with without_autocast(device):
            for chunk in split_for_memory(list(range(len(own))), shape.numel(), is_cpu, share):
                new_X_K = functools.partial(torch.stack, [X[k] for k in chunk])
                O_K = self._change([stand_ins[k] for k in chunk], new_X_K, [own_states[k] for k in chunk], group)
                directions += O_K.float().unbind()
        exchange.send_back("O_KMN", shape, directions, torch.float32, self.wire_dtype)
        for key in keys:
            exchange.send_back(key, keys[key], [state[key] for state in own_states], states[0][key].dtype)
        del X, stand_ins, own_states, directions
        yield
        take_off(weights, exchange.came_back("O_KMN"), *step_of(shape, group))
        for key in keys:
            torch._foreach_copy_([local(state[key]) for state in states], exchange.came_back(key))
        if "step" in self._inputs:
            for state in states:
                state["step"] += 1

    def _have_state(self, p: Tensor, group: dict[str, Any]) -> None:
        """See to it that a split parameter has the state that the group's settings ask for, every rank its rows."""
        state = self.state[p]
        if state and not self.optional_state:
            return
        wanted = self._new_state(torch.empty(p.shape, device="meta"), group)
        for key in [key for key in self.optional_state if key in state and key not in wanted]:
            del state[key]
        if wanted.keys() - state.keys():
            fresh = self._new_state(torch.empty(p.shape, dtype=p.dtype, device=p.device), group)
            state |= {key: value for key, value in split_as("its state", p, fresh).items() if key not in state}

    # ---- sharding over ranks ----

    @property
    def _is_sharded(self) -> bool:
        return len(self._rank_loads) > 1

    def owner_of(self, p: Tensor) -> int:
        """The rank of the process group that holds the state of this parameter and computes its update; under
        fully_shard the rank that computes the update, of those with whom this one shares the rows."""
        if not self._is_sharded and not is_dtensor(p):
            return 0
        if p not in self.owners:
            raise RuntimeError("a parameter was exchanged; build a sharded optimizer after the model is wrapped")
        return self.owners[p]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; a group that is refused changes nothing.

        Raises:
            ValueError: a hyper-parameter out of range, or a parameter that the group cannot update; says which.
        """
        param_group, defaults, num_groups = dict(param_group), self.defaults, len(self.param_groups)
        is_adamw = param_group.get("algorithm") == "adamw"
        try:
            check_foreign_settings(param_group)
            if is_adamw:
                check_adamw_group(param_group)
                self.defaults = ADAMW_DEFAULTS  # a group gets all defaults that it lacks
            elif not param_group.get("use_muon", True) or "betas" in param_group:
                raise ValueError('a group with use_muon = False or betas is AdamW\'s: it needs algorithm = "adamw"')
            super().add_param_group(param_group)
            group = self.param_groups[-1]
            if not is_adamw:
                group["adjust_lr_fn"] = group["adjust_lr_fn"] or "original"  # what torch.optim.Muon means by None
                for name, p in zip(names_of(group), group["params"], strict=True):
                    check_shape(name, p, group)
                    if is_dtensor(p) and self.process_group:
                        raise ValueError(f"{name} is split by fully_shard, which needs no process_group: leave it out")
                    check_ball(name, p, group)
                self.check_hparams(group)
        except BaseException:
            del self.param_groups[num_groups:]
            raise
        finally:
            self.defaults = defaults
        if not is_adamw:
            self._assign_owners(group)
            self._have_flags()

    def _assign_owners(self, group: dict[str, Any]) -> None:
        by_shard_group = group_by(group["params"], lambda p: shard_group(p) if is_dtensor(p) else None)
        for params in by_shard_group:
            costs = [sum(map(polar_cost, matrix_shapes(p.shape, group))) for p in params]
            loads = self._rank_loads
            if is_dtensor(params[0]):
                shards = shard_group(params[0])
                loads = self._shard_loads.setdefault(shards, [0] * dist.get_world_size(shards))
            self.owners.update(zip(params, assign_owners(costs, loads), strict=True))

    def _named_params(self) -> list[tuple[str, Tensor]]:
        """All parameters with their names, or their positions where they were given without."""
        params = [p for group in self.param_groups for p in group["params"]]
        names = [name for group in self.param_groups for name in group.get("param_names", [])]
        return list(zip(names or [f"parameter {i}" for i in range(len(params))], params, strict=True))

    def _matrices_and_owners(self) -> tuple[list[Tensor], list[int]]:
        groups = [group for group in self.param_groups if group["algorithm"] != "adamw"]
        params = [p for group in groups for p in group["params"] if p.requires_grad]
        return params, [self.owner_of(p) for p in params]

    @torch.no_grad()
    def reduce_gradients(self, wire_dtype: torch.dtype | None = None) -> None:
        """Sum gradients over ranks: a matrix's into its owner, where others drop theirs; AdamW's into all. Collective.

        Afterwards ranks hold different gradients: clip them with clip_grad_norm_() of this class, not torch's, and do
        not use a GradScaler.

        Args:
            wire_dtype: what is sent, by default the gradients' own dtype. In another one every rank's gradient is
                rounded to it once, and the sum is float32. Matrix gradients of a single backward pass in bfloat16
                lose nothing by that; sums over several passes do.

        Raises:
            ValueError: a parameter has no gradient.
        """
        if not self._is_sharded:
            return
        for name, p in self._named_params():
            if p.grad is None and p.requires_grad:
                raise ValueError(f"reduce_gradients: {name} of shape {tuple(p.shape)} has no gradient")
        params, owners = self._matrices_and_owners()
        sums = [sum_to_owners(gradients_of(params), owners, wire_dtype, self.process_group)] if params else []
        groups = [group for group in self.param_groups if group["algorithm"] == "adamw"]
        others = [p for group in groups for p in group["params"] if p.requires_grad]
        for same_dtype in group_by(others, lambda p: p.dtype):
            sums.append(sum_to_all(gradients_of(same_dtype), wire_dtype, self.process_group))
        complete(sums)
        for p, owner in zip(params, owners, strict=True):
            if owner != self._rank:
                p.grad = None

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """As torch.nn.utils.clip_grad_norm_, and right after reduce_gradients(), too. Collective when sharded.

        Returns the norm of all gradients before.
        """
        grads: list[Tensor] = []
        counted: dict[Any, list[Tensor]] = {}  # what this rank adds to the sum over each process group
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                grads.append(local(p.grad))
                if is_dtensor(p.grad):
                    if not is_by_rows(p.grad):
                        raise ValueError("clip_grad_norm_: a DTensor is not split by rows; use torch's clip_grad_norm_")
                    counted.setdefault(shard_group(p.grad), []).append(grads[-1])
                elif (0 if group["algorithm"] == "adamw" else self.owner_of(p)) == self._rank:
                    counted.setdefault(self.process_group, []).append(grads[-1])
        zero = grads[0].new_zeros((), dtype=torch.float32) if grads else torch.zeros(())
        process_groups = [*dict.fromkeys([self.process_group, *counted])]
        norm_sq = zero.clone()
        for process_group in process_groups:
            part = zero.clone()
            for grad in counted.get(process_group, []):
                part += torch.linalg.vector_norm(grad, dtype=torch.float32).square()
            if process_group is not None:
                dist.all_reduce(part, group=process_group)
            norm_sq += part
        norm = norm_sq.sqrt()
        if grads:
            torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    # ---- state ----

    def __getstate__(self) -> dict[str, Any]:
        # torch's version drops everything but groups and state; a copy must know its flags, too.
        if self._is_sharded or self._shard_loads:
            raise TypeError("a sharded optimizer cannot be copied or pickled; save its state_dict()")
        own = {key: self.__dict__[key] for key in ("_rank", "_rank_loads", "_shard_loads", "owners", "_non_finite")}
        return {**super().__getstate__(), **own, "process_group": None, "_whole_state": None}

    def consolidate_state_dict(self, to: int | None = None) -> None:
        """Gather the state of all matrices on rank `to` of the process group, or on all. Collective.

        state_dict() then has it, until the next step or load. Without sharding there is nothing to do.
        """
        if not self._is_sharded:
            return
        if to is not None and to not in range(len(self._rank_loads)):
            raise ValueError(f"to must be a rank below {len(self._rank_loads)}, got {to}")
        states = gather_states(*self._matrices_and_owners(), self.state, self.process_group, to)
        if to in (None, self._rank):
            self._whole_state = states | {p: state for p, state in self.state.items() if p not in self.owners}

    def state_dict(self) -> dict[str, Any]:
        """The whole state, in torch's form, the same on every rank and for every world size.

        Raises:
            RuntimeError: the state is sharded and has not been gathered since the last step.
        """
        if not self._is_sharded:
            return in_order(super().state_dict())
        if self._whole_state is None:
            raise RuntimeError(
                "the state is sharded over ranks: call consolidate_state_dict() on every rank, then state_dict() where "
                "it was gathered"
            )
        own, self.state = self.state, collections.defaultdict(dict, self._whole_state)
        try:
            return in_order(super().state_dict())
        finally:
            self.state = own

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state_dict() of the same rule and parameters, from any world size, bit for bit.

        As torch's loader, but a matrix's state keeps its dtype, whatever the weights' is. Settings that the saved
        groups lack stay as they are. What others have added to groups is kept, from both sides. Names count without the
        prefixes of torch.compile and DDP. Where one side has none, parameters are matched by position. Of a parameter
        that fully_shard has split, each rank takes its rows of state that is whole.

        Raises:
            ValueError: another rule, other parameters, or state of other keys, shape or dtype; names what differs.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        groups = loaded_groups(copy.deepcopy(state_dict["param_groups"]), self.param_groups, self.check_hparams)
        state: dict[Tensor, Any] = collections.defaultdict(dict)
        ours = [(name, p, group) for group in groups
                for name, p in zip(names_of(group), group["params"], strict=True)]  # fmt: skip
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        by_index = dict(zip(indices, ours, strict=True))
        for index, saved in state_dict["state"].items():
            if index not in by_index:
                raise ValueError(f"state of parameter number {index}, but there are {len(indices)}")
            name, p, group = by_index[index]
            if saved:
                is_adamw = group["algorithm"] == "adamw"
                new_state = None
                if not is_adamw:
                    new_state = self._new_state(torch.empty(p.shape, dtype=p.dtype, device="meta"), group)
                saved = split_as(name, p, saved)
                saved = checked_state(name, p, saved, group, new_state, self.optional_state)
                if is_adamw or is_dtensor(p) or self.owner_of(p) == self._rank:
                    state[p] = {
                        key: copied_to(device_of_state(key, p, is_adamw), value) for key, value in saved.items()
                    }
        self.__setstate__({"state": state, "param_groups": groups})
        self._whole_state = None
        for flag in self._non_finite.values():
            flag.zero_()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)
