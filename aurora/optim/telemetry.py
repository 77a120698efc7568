"""NeuronTelemetry: what an optimizer does to the neurons of any model's MLPs, in any trainer.

A neuron is a row of the layers that widen (up, and SwiGLU's gate) and a column of the layer that narrows again (down).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .base import MatrixOptimizer
from .diagnostics import (
    dead_neurons,
    effective_rank,
    leverage_histogram,
    leverage_scores,
    norm_quantiles,
    row_energies,
    silent_neurons,
    starved,
    wide,
)


class NeuronMatrix(NamedTuple):
    """A matrix of an MLP within a parameter.

    view: gives of a tensor of the parameter's shape the matrices (M, N) with the neurons as rows.
    """

    param: nn.Parameter
    view: Callable[[Tensor], list[Tensor]]
    makes_neurons: bool  # as up and gate do; down reads them


class Mlp(NamedTuple):
    """An MLP of a model.

    down: the layer whose input are the activations; None where a layer of experts holds all of them.
    is_gated: whether the activations are the product of a gate with another layer.
    """

    matrices: dict[str, NeuronMatrix]
    down: nn.Module | None
    is_gated: bool


class NeuronTelemetry:
    """Looks at the neurons of a model every so many optimizer steps, from hooks: the training loop stays as it is.

        telemetry = NeuronTelemetry(model, optimizer, every=100, report=lambda event: print(event["starved"]))

    The event of a step:

        step            optimizer steps since this was built
        dead            share of the neurons whose part in their layer's output is next to nothing
        silent          share of the neurons that are active on almost no token
        starved         share of the rows of up and gate whose update has under 0.1 of an even row's squared norm
        low_leverage    share of those rows whose leverage in what the rule saw is under 0.1 of an even one
        mlps            {name: {"width", "dead", "silent"}}, of the last training forward pass before the step
        matrices        {name: {"update_cv", "update_quantiles", "starved", "leverage_histogram", "low_leverage",
                        "low_streaks", "effective_rank"}}, see matrix_event()

    What cannot be seen is None: activations within a layer of experts or compiled code, momentum that another rank
    holds or that the optimizer does not keep, and what is not finite. Matrices that a step leaves alone are left out.
    Weight decay counts as part of the update for optimizers other than those of this package and torch's AdamW. Only
    steps that are looked at cost time: a copy of the MLPs' weights, and a few float64 decompositions. Models of
    torch.compile: build this before compiling.

    Args:
        model: any model; its MLPs are found by find_mlps().
        optimizer: the one that updates them; under accelerate the one that prepare() was given.
        every: steps from one look to the next.
        report: is called with each event, e.g. wandb.log; without one events are kept in .events.
        mlps: names of the layers of MLPs that find_mlps() does not know: {"name": (("up", "gate"), "down")}.

    Raises:
        ValueError: no MLP is found, or none that the optimizer updates.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        every: int = 100,
        report: Callable[[dict[str, Any]], Any] | None = None,
        mlps: Mapping[str, tuple[Sequence[str], str]] | None = None,
    ):
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.optimizer, self.every, self.report = optimizer, every, report
        self.mlps = find_mlps(model) if mlps is None else named_mlps(model, mlps)
        named = {name: matrix for mlp in self.mlps.values() for name, matrix in mlp.matrices.items()}
        self.matrices = named
        if not any(matrix.param in self._groups() for matrix in named.values()):
            seen = f"the optimizer updates none of {', '.join(named)}"
            seen = seen if named else "the model has no MLP that is known"
            raise ValueError(f'{seen}; name them: mlps={{"blocks.0": (("blocks.0.up",), "blocks.0.down")}}')
        self.step = 0
        self.events: list[dict[str, Any]] = []
        self.layers: dict[str, dict[str, Any]] = {}
        self.before: dict[nn.Parameter, tuple[Tensor, Tensor | None]] = {}
        self.streaks: dict[str, Tensor] = {}
        self.handles = [optimizer.register_step_pre_hook(self._keep), optimizer.register_step_post_hook(self._measure)]
        for name, mlp in self.mlps.items():
            if mlp.down is not None:
                hook = _Look(self, name, mlp)
                self.handles.append(mlp.down.register_forward_pre_hook(hook, with_kwargs=True))

    def remove(self) -> None:
        """Take all hooks off again."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    @property
    def is_due(self) -> bool:
        """Whether the step to come is looked at."""
        return (self.step + 1) % self.every == 0

    def _groups(self) -> dict[Tensor, dict[str, Any]]:
        """The group of every parameter. Loading a state gives the optimizer new ones."""
        return {p: group for group in self.optimizer.param_groups for p in group["params"]}

    @torch.no_grad()
    def _keep(self, *_: Any) -> None:
        if self.is_due:
            groups = self._groups()
            params = [matrix.param for matrix in self.matrices.values() if matrix.param in groups]
            self.before = {p: (p.detach().clone(), copy_of(momentum_of(self.optimizer, p))) for p in params}

    @torch.no_grad()
    def _measure(self, *_: Any) -> None:
        is_due, self.step = self.is_due, self.step + 1
        if not is_due:
            return
        matrices: dict[str, dict[str, Any]] = {}
        groups = self._groups()
        for name, matrix in self.matrices.items():
            p = matrix.param
            if p not in self.before or torch.equal(self.before[p][0], p):  # frozen, or an expert without tokens
                continue
            group, (weights, average) = groups[p], self.before[p]
            update = applied_update(weights, p, group, self.optimizer)
            seen = seen_by_rule(average, momentum_of(self.optimizer, p), group, self.optimizer)
            views = [matrix.view(X) if X is not None else [] for X in (update, p, seen)]
            for i, (U, W) in enumerate(zip(*views[:2], strict=True)):
                part = name if len(views[0]) == 1 else f"{name}[{i}]"
                streaks = self.streaks.setdefault(part, new_streaks(U))
                event = matrix_event(U, W, views[2][i] if views[2] else None, streaks)
                matrices[part] = event | {"rows": U.size(0)}
        layers, self.layers, self.before = self.layers, {}, {}
        makers = [entry for name, entry in matrices.items() if self.matrices[name.partition("[")[0]].makes_neurons]
        looked = {
            "step": self.step,
            **{key: _share(list(layers.values()), key, "width") for key in ("dead", "silent")},
            **{key: _share(makers, key, "rows") for key in ("starved", "low_leverage")},
            "mlps": layers,
            "matrices": matrices,
        }
        if self.report:
            self.report(looked)
        else:
            self.events.append(looked)


class _Look:
    """The hook before a down-projection. Copies of the model, also those in files, have one that looks at nothing."""

    def __init__(self, telemetry: NeuronTelemetry | None = None, name: str = "", mlp: Mlp | None = None):
        self.telemetry, self.name, self.mlp = telemetry, name, mlp

    def __reduce__(self) -> Any:
        return _Look, ()

    @torch.no_grad()
    def __call__(self, down: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.telemetry is None or self.mlp is None or not (self.telemetry.is_due and down.training):
            return
        activations = args[0] if args else next(iter(kwargs.values()))
        weight = next(matrix for matrix in self.mlp.matrices.values() if not matrix.makes_neurons)
        (down_MD,) = weight.view(weight.param)
        if activations.numel():
            self.telemetry.layers[self.name] = layer_event(activations, down_MD.T, self.mlp.is_gated)[0]


def _share(entries: list[dict[str, Any]], key: str, total: str) -> float | None:
    known = [entry for entry in entries if entry[key] is not None]
    return sum(entry[key] for entry in known) / sum(entry[total] for entry in known) if known else None


# ---- what is measured; the trainer's own telemetry, too, is made of these ----


def applied_update(before: Tensor, after: Tensor, group: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> Tensor:
    """What a step has taken off a parameter, float64, without the decoupled weight decay of optimizers known here."""
    is_decoupled = isinstance(optimizer, MatrixOptimizer | torch.optim.AdamW)
    decay = group["lr"] * group["weight_decay"] if is_decoupled else 0.0
    return wide(before) * (1 - decay) - wide(after)


def momentum_of(optimizer: torch.optim.Optimizer, p: Tensor) -> Tensor | None:
    """The average of a parameter's gradients, as the matrix rules and SGD call it, or AdamW."""
    state = optimizer.state.get(p, {})
    return state.get("momentum_buffer", state.get("exp_avg"))


def seen_by_rule(
    before: Tensor | None, after: Tensor | None, group: Mapping[str, Any], optimizer: torch.optim.Optimizer
) -> Tensor | None:
    """What a matrix rule has seen in a step, float64: its momentum, with Nesterov's look-ahead if it has one.

    before, after: the average of the gradients B before and after the step, B' = m B + (1 - m) G; the look-ahead
    (1 - m) G + m B' is made of both. Of other optimizers the average itself.
    """
    if after is None or not (isinstance(optimizer, LOOKING_AHEAD) and group.get("nesterov")):
        return after
    momentum = group["momentum"]
    ahead = wide(after) * (1 + momentum)
    return ahead if before is None else ahead - wide(before) * momentum


LOOKING_AHEAD = MatrixOptimizer, torch.optim.Muon  # which mix the gradient into the average alike


def copy_of(X: Tensor | None) -> Tensor | None:
    return None if X is None else X.detach().clone()


def new_streaks(X_MN: Tensor) -> Tensor:
    """(M,) for how many looks in a row each row has had low leverage: none yet."""
    return torch.zeros(X_MN.size(0), dtype=torch.int64, device="cpu" if X_MN.device.type == "mps" else X_MN.device)


def matrix_event(update_MN: Tensor, weights_MN: Tensor, seen_MN: Tensor | None, streaks_M: Tensor) -> dict[str, Any]:
    """What an update does to M neurons, the rows. The quantiles are 0, 0.1, 0.5, 0.9 and 1.

    update_cv: standard deviation of the row norms of the update over their mean; update_quantiles: of the row norms,
    in units of their mean; starved: rows with under a tenth of the mean squared norm. leverage_histogram: of what rows
    polar(seen) would give, squared, in units of an even row's, see LEVERAGE_EDGES; low_leverage: rows with under a
    tenth of it; low_streaks: rows that had as little at this look, at this and the one before, and so on.
    effective_rank: of the weights.

    seen_MN: see seen_by_rule(). streaks_M: is brought up to date.
    """
    keys = "update_cv", "update_quantiles", "starved"
    event: dict[str, Any] = dict.fromkeys(
        (*keys, "leverage_histogram", "low_leverage", "low_streaks", "effective_rank")
    )
    if update_MN.isfinite().all():
        energies = row_energies(update_MN)
        cv, quantiles = norm_quantiles(energies)
        event |= {"update_cv": rounded(cv), "update_quantiles": list(map(rounded, quantiles))}
        event["starved"] = int(starved(energies, energies.mean()).sum())
    if weights_MN.isfinite().all():
        event["effective_rank"] = rounded(effective_rank(weights_MN))
    if seen_MN is not None and seen_MN.isfinite().all():
        rows, columns = seen_MN.shape
        relative = leverage_scores(seen_MN) / min(1.0, columns / rows)
        relative = relative.round(decimals=9)  # an orthogonal square matrix is even, and 1 is the edge of a bin
        low = starved(relative, 1.0)
        streaks_M.add_(1).mul_(low.to(streaks_M.device))
        event["leverage_histogram"] = leverage_histogram(relative)
        event["low_leverage"] = int(low.sum())
        # Of the lengths: how many are at least 1, 2, and so on, up to the longest.
        event["low_streaks"] = torch.bincount(streaks_M).flip(0).cumsum(0).flip(0)[1:].tolist()
    return event


def layer_event(activations: Tensor, down_DM: Tensor, is_gated: bool) -> tuple[dict[str, Any], Tensor]:
    """How many of M neurons are dead or silent on these activations (..., M), and (M,) bool which are dead."""
    dead_M = dead_neurons(activations, down_DM)
    silent = int(silent_neurons(activations, is_gated).sum())
    return {"width": dead_M.numel(), "dead": int(dead_M.sum()), "silent": silent}, dead_M


def rounded(value: float) -> float:
    """To four digits."""
    return float(f"{value:.4g}")


# ---- which layers are MLPs ----


def find_mlps(model: nn.Module) -> dict[str, Mlp]:
    """The MLPs of a model by name, from the shapes of its layers.

    An MLP is the smallest module whose linear layers, square ones aside, are one up (D to M) and one down (M to D) with
    M > D, or a gate and an up, apart or in one layer (D to 2 M), and a down, for any M. Experts of transformers in
    three-dimensional parameters count as one MLP a layer.
    """
    found: dict[str, Mlp] = {}
    names = {module: name for name, module in model.named_modules()}
    taken: set[nn.Module] = set()

    def visit(module: nn.Module) -> list[nn.Module]:
        """The linear layers within, but for those of MLPs that were found there."""
        if _sizes(module):
            return [module]
        own = [layer for child in module.children() if child not in taken for layer in visit(child)]
        mlp = _experts(names[module], module) or _mlp(names, own)
        if mlp:
            found[names[module]] = mlp
            taken.update(own)
            return []
        return own

    visit(model)
    order = {name: i for i, name in enumerate(names.values())}
    return dict(sorted(found.items(), key=lambda item: order[item[0]]))


def named_mlps(model: nn.Module, wanted: Mapping[str, tuple[Sequence[str], str]]) -> dict[str, Mlp]:
    """The MLPs that the user names: {"name": (("up", "gate"), "down")}.

    Raises:
        ValueError: no such layer, or layers that do not fit together.
    """
    modules = dict(model.named_modules())
    names = {module: name for name, module in modules.items()}
    mlps = {}
    for name, (ups, down) in wanted.items():
        missing = [layer for layer in (*ups, down) if layer not in modules or not _sizes(modules[layer])]
        if missing:
            raise ValueError(f"mlps[{name!r}]: {', '.join(missing)} is no linear layer of the model")
        layers, last = [modules[layer] for layer in ups], modules[down]
        neurons = _sizes(last)[0]
        if not all(_sizes(layer)[1] in (neurons, 2 * neurons) for layer in layers):
            raise ValueError(f"mlps[{name!r}]: {', '.join(ups)} do not make the {neurons} inputs of {down}")
        mlps[name] = _as_mlp(names, layers, last)
    return mlps


def _sizes(module: nn.Module) -> tuple[int, ...]:
    """Inputs and outputs of a linear layer, or nothing. transformers' Conv1D has its weight as (in, out)."""
    if not isinstance(getattr(module, "weight", None), nn.Parameter):  # a parametrization makes it from others
        return ()
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return tuple(module.get_parameter("weight").shape)
    return ()


def _mlp(names: Mapping[nn.Module, str], layers: list[nn.Module]) -> Mlp | None:
    """The MLP that these layers make, if it is one."""
    layers = [layer for layer in layers if len(set(_sizes(layer))) == 2]
    for down in layers if len(layers) in (2, 3) else []:
        ups = [layer for layer in layers if layer is not down]
        (neurons, dim), sizes = _sizes(down), [_sizes(up) for up in ups]
        is_plain = sizes == [(dim, neurons)] and neurons > dim and down is layers[-1]  # an adapter narrows first
        if is_plain or sizes in ([(dim, neurons)] * 2, [(dim, 2 * neurons)]):
            return _as_mlp(names, ups, down)
    return None


def _as_mlp(names: Mapping[nn.Module, str], ups: list[nn.Module], down: nn.Module) -> Mlp:
    neurons = _sizes(down)[0]
    matrices = {}
    for layer in (*ups, down):
        is_first_last = isinstance(layer, nn.Linear) != (layer is down)  # whether the neurons lie along dimension 0
        num_parts = _sizes(layer)[1] // neurons if layer is not down else 1
        view = _rows_first(is_first_last, num_parts)
        matrices[f"{names[layer]}.weight"] = NeuronMatrix(layer.get_parameter("weight"), view, layer is not down)
    return Mlp(matrices, down, len(ups) == 2 or _sizes(ups[0])[1] == 2 * neurons)


def _rows_first(is_first: bool, num_parts: int) -> Callable[[Tensor], list[Tensor]]:
    return lambda X: list((X if is_first else X.T).chunk(num_parts))


def _experts(name: str, module: nn.Module) -> Mlp | None:
    """The experts of transformers 5 and later: (E, 2 M, D) and (E, D, M), or transposed."""
    weights = dict(module.named_parameters(recurse=False))
    up = weights.get("gate_up_proj", weights.get("up_proj"))
    down = weights.get("down_proj")
    if up is None or down is None or up.ndim != 3 or not hasattr(module, "is_transposed"):
        return None
    is_gated, is_turned = "gate_up_proj" in weights, bool(module.is_transposed)
    is_interleaved = is_gated and not getattr(module, "is_concatenated", True)

    def view_up(X: Tensor) -> list[Tensor]:
        rows = [X_MN.T if is_turned else X_MN for X_MN in X]
        if is_interleaved:
            return [part for X_MN in rows for part in (X_MN[::2], X_MN[1::2])]
        return [part for X_MN in rows for part in X_MN.chunk(2 if is_gated else 1)]

    def view_down(X: Tensor) -> list[Tensor]:
        return [X_MN if is_turned else X_MN.T for X_MN in X]

    prefix = f"{name}." if name else ""
    matrices = {
        f"{prefix}{'gate_up_proj' if is_gated else 'up_proj'}": NeuronMatrix(up, view_up, True),
        f"{prefix}down_proj": NeuronMatrix(down, view_down, False),
    }
    return Mlp(matrices, None, is_gated)
