"""What a rule does to a stack of matrices of one shape: from their momentum to the step that their weights take.

Which rank does it, and what is saved, is in base.py.
"""

import abc
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .inputs import check_inputs, inputs_of, new_step, stacked_inputs, stacked_weights
from .polar import COMPUTE_DTYPES, SCHEDULES, compute_dtype, polar
from .shapes import is_one_matrix, joined_rows, matrix_shapes, split_rows, to_matrices
from .stacks import PARTS_SHARE, gradients_of, lookahead, split_for_memory
from .update import is_modified, lr_factor, lr_of, modified_step

ADJUST_LR_FNS = ("spectral", "original", "match_rms_adamw")


class StackedRule(torch.optim.Optimizer, abc.ABC):
    """The part of MatrixOptimizer that computes."""

    optional_state: tuple[str, ...] = ()  # keys of a rule's state that some settings do without
    _inputs: frozenset[str] = frozenset()  # what direction() asks for beside the momentum

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        cls._inputs = inputs_of(cls.direction)

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]):
        check_inputs(type(self).__name__, self._inputs)
        self._non_finite: dict[torch.device, Tensor] = {}
        super().__init__(params, defaults)

    # ---- what a rule overrides ----

    @abc.abstractmethod
    def direction(
        self, X_KMN: Tensor, states: list[dict[str, Any]], group: dict[str, Any], *args: Any, **inputs: Any
    ) -> Tensor:
        """The update direction of a stack of same-shape matrices, before scale and lr.

        Args:
            X_KMN: (K, M, N) float32 momentum; its memory is the rule's, to work in.
            states: the state of each of the K matrices, in stack order, to be changed in place; see new_state().
            group: the hyper-parameters.
            inputs: a rule that names keyword-only arguments G_KMN, W_KMN or step gets them; see inputs.py. The * and
                ** of this signature are for type checkers: they let it.

        Returns:
            (K, M, N), float32 or the dtype of the polar factor.
        """

    def new_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The state of a matrix before its first step: tensors of at least one dimension. A rule that keeps more
        extends this."""
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
        check_hparam(
            group["adjust_lr_fn"] in ADJUST_LR_FNS, "adjust_lr_fn", f"one of {', '.join(ADJUST_LR_FNS)}", group
        )
        check_hparam(group["update_floor"] >= 0, "update_floor", "at least 0", group)
        ratio_is_free = not (group["hyperball"] and group["update_floor"])
        check_hparam(ratio_is_free, "update_floor", "0 with hyperball, which makes that ratio 1", group)
        rule = type(self).__name__
        check_hparam(group["algorithm"] == rule, "algorithm", f'"adamw" or "{rule}"', group)

    # ---- from momentum to a step ----

    def polar_dtype(self, X_KMN: Tensor, group: dict[str, Any]) -> torch.dtype:
        """The dtype of the matmuls."""
        return compute_dtype(group["polar_dtype"], X_KMN.device)

    def polar(self, X_KMN: Tensor, group: dict[str, Any], **options: Any) -> Tensor:
        """polar() with the group's schedule and dtype."""
        return polar(X_KMN, SCHEDULES[group["polar_schedule"]], self.polar_dtype(X_KMN, group), **options)

    @property
    def found_non_finite(self) -> Tensor:
        """0-dim bool: whether a matrix has had a non-finite direction; it stays set, on every rank alike."""
        flags = list(self._non_finite.values()) or [torch.zeros((), dtype=torch.bool)]
        return torch.stack([flag.to(flags[0].device) for flag in flags]).any() if len(flags) != 1 else flags[0]

    def _have_flags(self) -> None:
        """See to it that every device that holds matrices has a flag: the model may have been moved."""
        groups = [group for group in self.param_groups if group["algorithm"] != "adamw"]
        devices = dict.fromkeys(p.device for group in groups for p in group["params"])
        if self._non_finite.keys() != devices.keys():
            was_set = self.found_non_finite
            was_set = torch.zeros_like(was_set, device="cpu") if was_set.is_meta else was_set
            self._non_finite = {device: was_set.to(device, copy=True) for device in devices}

    def _share(self, share: float, group: dict[str, Any]) -> float:
        """Of the largest stack, where inputs and modifiers need room as well.

        The factors keep the temporary memory of a step below 2.5 of such stacks: tests/test_optimizer_speed.py measures
        it.
        """
        return share / (1 + 0.35 * len(self._inputs - {"step"})) * (0.6 if is_modified(group) else 1)

    def _steps_taken(self, p: Tensor) -> int:
        """By which matrices that are in one stack must agree, for a rule that asks for step; else 0."""
        return int(self.state[p].get("step", 0)) if "step" in self._inputs else 0

    def _change(
        self, stack: list[Tensor], new_X_K: Callable[[], Tensor], states: list[dict[str, Any]], group: dict[str, Any]
    ) -> Tensor:
        """(K, *shape): what step_of() multiplies and take_off() takes off the weights of parameters of one shape.

        new_X_K: makes (K, *shape) momentum, which is held nowhere else.
        """
        if not is_one_matrix(group):
            return self._change_of_parts(stack, new_X_K().contiguous(), states, group)
        inputs = stacked_inputs(self._inputs, stack, group, states)
        O_KMN = self._checked(self.direction(new_X_K(), states, group, **inputs))
        return modified_step(O_KMN, stacked_weights(stack, group), group) if is_modified(group) else O_KMN

    def _checked(self, O_KMN: Tensor) -> Tensor:
        """A direction as it is, with the flag set where it is not finite."""
        is_bad = ~torch.linalg.vector_norm(O_KMN).isfinite()
        self._non_finite[O_KMN.device].logical_or_(is_bad)  # in place: before torch 2.13 no compiled step may set one
        return O_KMN

    def _change_of_parts(
        self, stack: list[Tensor], X_K: Tensor, states: list[dict[str, Any]], group: dict[str, Any]
    ) -> Tensor:
        """(K, *shape): direction() times lr_factor(), or modified_step(), of parameters of one shape that hold several
        matrices each. X_K is overwritten."""
        shapes = matrix_shapes(stack[0].shape, group)
        parts = [part for X in X_K for part in to_matrices(X, group)]  # views of it, overwritten one after the other
        part_states = [
            part for p, state in zip(stack, states, strict=True) for part in self._split_state(p, state, group)
        ]
        for shape in dict.fromkeys(shapes):
            indices = [i for i in range(len(parts)) if shapes[i % len(shapes)] == shape]
            for chunk in split_for_memory(indices, shape[0] * shape[1], X_K.is_cpu, self._share(PARTS_SHARE, group)):
                X_KMN, chunk_states = torch.stack([parts[i] for i in chunk]), [part_states[i] for i in chunk]
                inputs = stacked_inputs(self._inputs, stack, group, states, chunk)
                O_KMN = self._checked(self.direction(X_KMN, chunk_states, group, **inputs))
                if is_modified(group):
                    O_KMN, factor = modified_step(O_KMN, stacked_weights(stack, group, chunk), group), 1.0
                else:
                    factor = lr_factor(*shape, group)
                for i, O_MN in zip(chunk, O_KMN.unbind(), strict=True):
                    parts[i].copy_(O_MN).mul_(factor)
        return X_K

    def _new_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """new_state() of all matrices of a parameter: momentum as the weights lie, row states one below the other."""
        steps = {"step": new_step()} if "step" in self._inputs else {}
        if is_one_matrix(group):
            return {**self.new_state(p, group), **steps}
        parts = [self.new_state(p.new_empty(shape), group) for shape in matrix_shapes(p.shape, group)]
        keys = dict.fromkeys(key for part in parts for key in part if key != "momentum_buffer")
        rows = {key: joined_rows([part[key] for part in parts if key in part]) for key in keys}
        return {"momentum_buffer": torch.zeros_like(p, dtype=torch.float32), **rows, **steps}

    def _split_state(self, p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> list[dict[str, Any]]:
        """The row states of each matrix of a parameter, as views."""
        shapes = matrix_shapes(p.shape, group)
        own = {shape: self.new_state(torch.empty(shape, device="meta"), group) for shape in dict.fromkeys(shapes)}
        wanted = {key for part in own.values() for key in part}
        # A setting may have been changed on which the state depends.
        for key in [key for key in self.optional_state if key in state and key not in wanted]:
            del state[key]
        if missing := wanted - state.keys():
            fresh = self._new_state(p, group)
            state.update({key: fresh[key] for key in missing})
        parts: list[dict[str, Any]] = [{} for _ in shapes]
        for key in wanted - {"momentum_buffer"}:
            holders = [i for i, shape in enumerate(shapes) if key in own[shape]]  # square matrices may need none
            rows = split_rows(state[key], [own[shapes[i]][key] for i in holders])
            for i, of_part in zip(holders, rows, strict=True):
                parts[i][key] = of_part
        return parts

    def lookahead(self, stack: list[Tensor], group: dict[str, Any]) -> Tensor:
        """(K, *shape) float32: what direction() sees of K parameters of one shape and group.

        Between step() and the next zero_grad() it gives what the step has used.
        """
        return lookahead(gradients_of(stack), [self.state[p]["momentum_buffer"] for p in stack], group)


def step_of(shape: torch.Size, group: dict[str, Any]) -> tuple[float | Tensor, float | Tensor]:
    """Step size and decay that take_off() gets with what _change() returns for parameters of this shape."""
    if is_modified(group):
        return 1.0, 0.0
    lr = lr_of(group)
    decay = lr * group["weight_decay"] if group["weight_decay"] else 0.0
    return lr * lr_factor(shape[0], shape[1], group) if is_one_matrix(group) else lr, decay


def check_hparam(is_valid: bool, key: str, wanted: str, group: dict[str, Any]) -> None:
    if not is_valid:
        raise ValueError(f"{key} must be {wanted}, got {group[key]!r}")
