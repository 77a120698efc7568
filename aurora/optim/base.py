"""What all matrix optimizers share: momentum, same-shape stacks, sharding over ranks, decay, scale, state.

A rule is a subclass that overrides direction(), and new_state() if it remembers anything:

    B <- momentum B + (1 - momentum) G                       momentum buffer, kept by the matrix's owner
    X  = (1 - momentum) G + momentum B                       with nesterov, else B
    W <- (1 - lr weight_decay) W - lr scale direction(X)     scale = sqrt(max(1, M/N)) with aspect_scale, else 1

polar(X) has spectral norm 1, so lr is in units of spectral norm per step for the polar rules.
"""

import abc
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .polar import COMPUTE_DTYPES, SCHEDULES, compute_dtype, polar
from .sharding import assign_owners, complete, gather_from_owners, polar_cost, sum_to_owners

# On a CPU a stack larger than the caches is slower than its parts one by one.
CPU_STACK_ELEMENTS = 2**21


class MatrixOptimizer(torch.optim.Optimizer, abc.ABC):
    """Base of the rules that update whole matrices. Works alone, under DDP, or sharding its work over a process group.

    If torch.distributed is initialised when the optimizer is built, every matrix gets one owner rank. step() reads
    the gradient on the owner alone and hands the new weights to all ranks; step(), reduce_gradients() and
    state_dict() are then collectives that every rank must call. Gradients must already be summed (or averaged) over
    ranks: by DDP, or by reduce_gradients(), which sends each gradient to its owner only.

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
        rule_hparams: for subclasses: the hyper-parameters that the rule adds.

    lr and momentum may be 0-dim tensors, as for torch's optimizers. A step under torch.compile is then not compiled
    again when they change.

    Raises:
        ValueError: a hyper-parameter out of range, or a parameter that is not a plain 2-D floating-point tensor.
    """

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
        rule_hparams: dict[str, Any] | None = None,
    ):
        is_distributed = dist.is_available() and dist.is_initialized()
        self._rank = dist.get_rank() if is_distributed else 0
        self._rank_loads = [0] * (dist.get_world_size() if is_distributed else 1)
        self._owners: dict[Tensor, int] = {}
        self.found_non_finite = torch.zeros((), dtype=torch.bool)
        defaults = dict(
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            aspect_scale=aspect_scale,
            polar_schedule=polar_schedule,
            polar_dtype=polar_dtype,
            **(rule_hparams or {}),
        )
        super().__init__(params, defaults)

    # ---- what a rule overrides ----

    @abc.abstractmethod
    def direction(self, X_KMN: Tensor, states: list[dict[str, Any]], group: dict[str, Any]) -> Tensor:
        """The update direction of a stack of same-shape matrices, before scale and lr.

        Args:
            X_KMN: (K, M, N) float32 momentum, not to be changed.
            states: the state of each of the K matrices, in stack order, to be changed in place; see new_state().
            group: the hyper-parameters.

        Returns:
            (K, M, N), float32 or the dtype of the polar factor.
        """

    def new_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The state of a matrix before its first step. A rule that keeps more extends this."""
        # float32 whatever the weights are: in bfloat16 an average over 20 steps loses most of its increments.
        return {"momentum_buffer": torch.zeros_like(p, dtype=torch.float32)}

    def check_hparams(self, group: dict[str, Any]) -> None:
        """Raise ValueError for a hyper-parameter out of range. A rule that adds some extends this."""
        check_hparam(group["lr"] >= 0, "lr", "at least 0", group)
        check_hparam(group["weight_decay"] >= 0, "weight_decay", "at least 0", group)
        check_hparam(0 <= group["momentum"] < 1, "momentum", "in [0, 1)", group)
        check_hparam(group["polar_schedule"] in SCHEDULES, "polar_schedule", f"one of {', '.join(SCHEDULES)}", group)
        check_hparam(
            group["polar_dtype"] in COMPUTE_DTYPES, "polar_dtype", f"one of {', '.join(COMPUTE_DTYPES)}", group
        )

    # ---- the step ----

    def polar_dtype(self, X_KMN: Tensor, group: dict[str, Any]) -> torch.dtype:
        """The dtype of the matmuls."""
        return compute_dtype(group["polar_dtype"], X_KMN.device)

    def polar(self, X_KMN: Tensor, group: dict[str, Any], **options: Any) -> Tensor:
        """polar() with the group's schedule and dtype."""
        return polar(X_KMN, SCHEDULES[group["polar_schedule"]], self.polar_dtype(X_KMN, group), **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every matrix that has a gradient. No host sync.

        A non-finite gradient makes its matrix non-finite and sets found_non_finite, a 0-dim tensor on the device that
        stays set. To keep weights whole, check gradients before the step (the trainer does).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gathers = []
        for group in self.param_groups:
            # Equal sizes together, whatever the shape: each rank owns about as many of them.
            for same_size in group_by(group["params"], lambda p: (p.numel(), p.dtype)):
                own = [p for p in same_size if p.grad is not None and self._owners[p] == self._rank]
                for same_shape in group_by(own, lambda p: p.shape):
                    for stack in split_for_cache(same_shape):
                        self._update(stack, group)
                if self._is_sharded:
                    gathers.append(gather_from_owners(same_size, [self._owners[p] for p in same_size]))
        for wait in gathers:
            wait()
        return loss

    def _update(self, stack: list[Tensor], group: dict[str, Any]) -> None:
        states = [self.state[p] for p in stack]
        for p, state in zip(stack, states, strict=True):
            if not state:
                state.update(self.new_state(p, group))
        buffers = [state["momentum_buffer"] for state in states]
        grads = [grad.float() for grad in gradients_of(stack)]
        torch._foreach_lerp_(buffers, grads, _weights(1 - group["momentum"], stack))
        X_KMN = torch.stack(self.lookahead(stack, group))
        O_KMN = self.direction(X_KMN, states, group)

        is_bad = ~torch.linalg.vector_norm(O_KMN).isfinite()
        self.found_non_finite.logical_or_(is_bad)  # in place: torch.compile before 2.13 lets a step set no attribute
        rows, columns = stack[0].shape
        step_size = group["lr"] * (math.sqrt(max(1.0, rows / columns)) if group["aspect_scale"] else 1.0)
        if group["weight_decay"]:
            torch._foreach_mul_(stack, 1 - group["lr"] * group["weight_decay"])
        if isinstance(step_size, Tensor):  # which alpha may not be
            O_KMN, step_size = O_KMN.float() * step_size, 1
        O_KMN = O_KMN.to(torch.promote_types(O_KMN.dtype, stack[0].dtype))  # of one dtype it is one launch on CUDA
        torch._foreach_sub_(stack, list(O_KMN.unbind()), alpha=step_size)

    def lookahead(self, stack: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """What direction() sees of these parameters of one group: (M, N) float32 each, not to be changed.

        Between step() and the next zero_grad() it gives what the step has used.
        """
        buffers = [self.state[p]["momentum_buffer"] for p in stack]
        if not group["nesterov"]:
            return buffers
        grads = [grad.float() for grad in gradients_of(stack)]
        return list(torch._foreach_lerp(grads, buffers, _weights(group["momentum"], stack)))

    # ---- sharding over ranks ----

    @property
    def _is_sharded(self) -> bool:
        return len(self._rank_loads) > 1

    def owner_of(self, p: Tensor) -> int:
        """The rank that holds the state of this parameter and computes its update."""
        return self._owners[p]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        names = group.get("param_names", [f"parameter {i}" for i in range(len(group["params"]))])
        for name, p in zip(names, group["params"], strict=True):
            if p.ndim != 2 or not p.is_floating_point() or type(p.data) is not Tensor:
                raise ValueError(
                    f"{type(self).__name__} updates plain 2-D floating-point tensors, but {name} is a "
                    f"{type(p.data).__name__} of shape {tuple(p.shape)} and dtype {p.dtype}; give it to AdamW"
                )
        self.check_hparams(group)
        self.found_non_finite = self.found_non_finite.to(group["params"][0].device)
        owners = assign_owners([polar_cost(p) for p in group["params"]], self._rank_loads)
        self._owners.update(zip(group["params"], owners, strict=True))

    def _named_params(self) -> list[tuple[str, Tensor]]:
        """All parameters with their names, or their positions where they were given without."""
        params = [p for group in self.param_groups for p in group["params"]]
        names = [name for group in self.param_groups for name in group.get("param_names", [])]
        return list(zip(names or [f"parameter {i}" for i in range(len(params))], params, strict=True))

    def _params_and_owners(self) -> tuple[list[Tensor], list[int]]:
        params = [p for group in self.param_groups for p in group["params"]]
        return params, [self._owners[p] for p in params]

    @torch.no_grad()
    def reduce_gradients(self, wire_dtype: torch.dtype | None = None) -> None:
        """Sum every gradient over ranks into the owner of its matrix; other ranks drop theirs. Collective.

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
            if p.grad is None:
                raise ValueError(f"reduce_gradients: {name} of shape {tuple(p.shape)} has no gradient")
        params, owners = self._params_and_owners()
        complete([sum_to_owners(gradients_of(params), owners, wire_dtype)])
        for p, owner in zip(params, owners, strict=True):
            if owner != self._rank:
                p.grad = None

    # ---- state ----

    def __getstate__(self) -> dict[str, Any]:
        # torch's version drops everything but groups and state; a copy must know its owners too.
        sharding = {key: self.__dict__[key] for key in ("_rank", "_rank_loads", "_owners", "found_non_finite")}
        return {**super().__getstate__(), **sharding}

    def state_dict(self) -> dict[str, Any]:
        """The whole optimizer state, the same on every rank and for every world size. Collective when sharded."""
        state_dict = super().state_dict()
        state_dict["rule"] = type(self).__name__
        if self._is_sharded:
            state_dict["state"] = self._gather_state(state_dict["state"])
        state_dict["state"] = dict(sorted(state_dict["state"].items()))
        state_dict["params_with_state"] = [self._named_params()[index][0] for index in state_dict["state"]]
        return state_dict

    def _gather_state(self, own_state: dict[int, dict[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
        params, owners = self._params_and_owners()
        layout = {i: {key: (t.shape, t.dtype) for key, t in state.items()} for i, state in own_state.items()}
        layouts: list[Any] = [None] * len(self._rank_loads)
        dist.all_gather_object(layouts, layout)
        gathered: dict[int, dict[str, Tensor]] = {}
        for index, (p, owner) in enumerate(zip(params, owners, strict=True)):
            for key, (shape, dtype) in layouts[owner].get(index, {}).items():
                is_owner = owner == self._rank
                value = own_state[index][key] if is_owner else torch.empty(shape, dtype=dtype, device=p.device)
                dist.broadcast(value, src=owner)
                gathered.setdefault(index, {})[key] = value
        return gathered

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state_dict() of the same rule and parameters, from any world size, bit for bit.

        torch's own loader matches by position and casts to the weights' dtype, silently; this one refuses.

        Raises:
            ValueError: another rule, other parameters, state lost or of other keys, shape or dtype; names what differs.
        """
        named = self._named_params()
        if state_dict.get("rule") != type(self).__name__:
            raise ValueError(f"state of rule {state_dict.get('rule')!r} cannot be loaded into {type(self).__name__}")
        our_params, their_params = ([g.get("param_names", g["params"]) for g in d["param_groups"]]
                                    for d in (super().state_dict(), state_dict))  # fmt: skip
        if our_params != their_params:
            raise ValueError(f"state belongs to parameters {their_params}, this optimizer has {our_params}")
        for ours, theirs in zip(self.param_groups, state_dict["param_groups"], strict=True):
            if ours.keys() != theirs.keys():
                differing = ", ".join(sorted(ours.keys() ^ theirs.keys()))
                raise ValueError(
                    f"the settings {differing} are in only one of the state and this {type(self).__name__}"
                )
            self.check_hparams(theirs)
        settings = [
            (ours, theirs)
            for ours, theirs in zip(self.param_groups, state_dict["param_groups"], strict=True)
            for _ in ours["params"]
        ]
        for index in state_dict["state"]:
            if index not in range(len(named)):
                raise ValueError(f"state of parameter number {index}, but there are {len(named)}")
        lost = set(state_dict["params_with_state"]) ^ {named[index][0] for index in state_dict["state"]}
        if lost:
            raise ValueError(f"the state of {', '.join(sorted(lost))} is lost, or of a parameter that had none")
        for index, state in state_dict["state"].items():
            name, p = named[index]
            found = {key: (tuple(value.shape), value.dtype) for key, value in state.items()}
            for group in settings[index]:  # what this optimizer keeps, and what the state's own settings keep
                new_state = self.new_state(torch.empty_like(p, device="meta"), group)
                wanted = {key: (tuple(value.shape), value.dtype) for key, value in new_state.items()}
                if found != wanted:
                    raise ValueError(f"state of {name} is {found}, but {type(self).__name__} keeps {wanted} for it")
        super().load_state_dict({**state_dict, "state": {}})
        for index, state in state_dict["state"].items():
            p = named[index][1]
            if self._owners[p] == self._rank:
                self.state[p] = {key: value.to(p.device, copy=True) for key, value in state.items()}
        self.found_non_finite.zero_()


def gradients_of(params: Iterable[Tensor]) -> list[Tensor]:
    """The gradients of the parameters that have one."""
    return [p.grad for p in params if p.grad is not None]


def _weights(weight: float | Tensor, stack: list[Tensor]) -> float | list[Tensor]:
    """The weight as foreach_lerp takes it for this stack."""
    return [weight] * len(stack) if isinstance(weight, Tensor) else weight


def group_by(params: Iterable[Tensor], key: Callable[[Tensor], Any]) -> list[list[Tensor]]:
    """The parameters in groups of equal key, both in order of appearance."""
    groups: dict[Any, list[Tensor]] = {}
    for p in params:
        groups.setdefault(key(p), []).append(p)
    return list(groups.values())


def split_for_cache(stack: list[Tensor]) -> list[list[Tensor]]:
    """The stack in parts that a CPU's caches hold; on other devices whole."""
    size = max(1, CPU_STACK_ELEMENTS // stack[0].numel()) if stack[0].is_cpu else len(stack)
    return [stack[first : first + size] for first in range(0, len(stack), size)]


def check_hparam(is_valid: bool, key: str, wanted: str, group: dict[str, Any]) -> None:
    if not is_valid:
        raise ValueError(f"{key} must be {wanted}, got {group[key]!r}")
