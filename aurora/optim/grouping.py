"""param_groups(): which parameters of a model are matrices, and how they lie in memory, from the types of its layers.

Nothing is read off the names of parameters. What a layer of torch does with its weights is known. Of transformers,
timm, torchvision and mamba_ssm some layers are known by class: see layers.py. All else is the user's to say.
"""

import difflib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from math import prod
from typing import Any, NamedTuple

from torch import Tensor, nn

from .heads import find_heads
from .layers import (
    GROUPS,
    LAYOUTS,
    MATRIX_GROUPS,
    Choice,
    Layer,
    choose,
    is_of,
    num_wide,
)


class Row(NamedTuple):
    """A line of the table: a parameter, the layer that holds it, where it went and why."""

    name: str
    shape: tuple[int, ...]
    layer: str
    group: str
    options: dict[str, Any]
    why: str


class ParamGroups(list[dict[str, Any]]):
    """A list of parameter groups, ready for a constructor. str() of it is a table with a row for every parameter.

    In it the parameters of repeated layers share a line, with their count, and so do vectors of like layers.

    Attributes:
        rows: the table, a Row for every trainable parameter in the order of the model.
        note: what the user should look at, or "".
    """

    def __init__(self, groups: list[dict[str, Any]], rows: list[Row], note: str):
        super().__init__(groups)
        self.rows, self.note = rows, note

    def __str__(self) -> str:
        merged: dict[Any, list[Row]] = {}
        for row in self.rows:
            merged.setdefault((*_alike(row), *map(str, row[2:])), []).append(row)
        lines = [("parameter", "count", "shape", "layer", "group", "options", "why")]
        for (pattern, shape, *_), rows in merged.items():
            row = rows[0]
            name, shape = (row.name, str(row.shape)) if len(rows) == 1 else (pattern, shape)
            options = " ".join(f"{key}={_short(value)}" for key, value in row.options.items())
            lines.append((name, str(len(rows)), shape, row.layer, row.group, options, row.why))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        return "\n".join([*table, *filter(None, [self.note])])


def param_groups(
    model: nn.Module,
    *,
    lr: float | None = None,
    weight_decay: float | None = None,
    adamw_lr: float = 3e-4,
    adamw_betas: tuple[float, float] = (0.9, 0.95),
    adamw_eps: float = 1e-8,
    adamw_weight_decay: float = 0.0,
    embedding_lr: float | None = None,
    head_lr: float | None = None,
    head: str | None = "auto",
    split_fused: bool = True,
    overrides: Mapping[str, str | Mapping[str, Any]] | None = None,
) -> ParamGroups:
    """Sort every trainable parameter of a model into groups for the optimizers of this package, each exactly once.

    | group | what is in it | options |
    |---|---|---|
    | `matrix` | weights of linear layers, (out, in); of transformers' Conv1D, (in, out) | `layout`, `split` |
    | `conv` | weights of convolutions, (out, in, k...), each seen as (out, rest) | `view`, `layout`, `split` |
    | `experts` | weights of E experts, (E, M, N), each a matrix | `view`, `layout`, `split` |
    | `embedding` | embeddings, tied to the head or not | `algorithm="adamw"` |
    | `head` | the weight of the output head | `algorithm="adamw"` |
    | `vector` | biases, norms, all with at most one dimension above 1; without weight decay | `algorithm="adamw"` |

    `layout` is "in_out" where the input comes first. `split` gives the sizes, along the outputs, of matrices that lie
    in one parameter. A transposed convolution (in, out, k...) is a conv with layout "in_out": its matrix is the
    transpose of (in, rest). A convolution of G groups is split into G; a depthwise one, whose filters have a
    single input each, is a vector.

    An optimizer fills in the groups it gets: call this again for a second one.

    Args:
        model: any model, also under DDP, torch.compile or PEFT. Frozen parameters are left out.
        lr: of the matrices; None leaves it to the optimizer.
        weight_decay: of the matrices; None leaves it to the optimizer.
        adamw_lr: of all other groups.
        adamw_betas: of all other groups.
        adamw_eps: of all other groups.
        adamw_weight_decay: of embeddings and heads.
        embedding_lr: by default adamw_lr.
        head_lr: by default adamw_lr.
        head: the name of the head's weight, as in overrides; None if there is none; "auto" looks for it. A model of
            transformers says what its head is. Elsewhere it is the linear layer with an output for every entry of an
            embedding, else the last linear layer, if no layer takes as many inputs as it has outputs.
        split_fused: whether weights that are known to hold several matrices, q, k, v say, are split into them.
        overrides: from a pattern with * and ?, of names or, if none is such, of their ends after a dot, to the name of
            a group ("adamw" is for what fits none) or to options: dict(view="experts", layout="in_out") is a matrix,
            dict(algorithm="adamw", lr=1e-3) is none, dict(lr=0.01) leaves that as it is found. They win over all else,
            and the first pattern that matches over the next.

    Returns:
        Groups with "name", "params" as (name, parameter) pairs, and options. print() them to see where all went.

    Raises:
        ValueError: a parameter whose use is not known (all of them, and how to say it), a pattern that matches
            nothing, options that do not fit a shape, lazy parameters, FullyShardedDataParallel, or nothing to train.
    """
    layers: dict[Tensor, list[Layer]] = {}
    for layer, p in _layers(model):
        layers.setdefault(p, []).append(layer)
    _check_sortable(model, layers)
    names = {p: [layer.name for layer in layers[p]] for p in layers}
    overridden = _overridden(names, overrides or {})
    decided = {p: choice for p, choice in overridden.items() if choice.group}
    if head is None or head == "auto":
        heads, note = find_heads(model, layers, decided) if head else ({}, "")
    else:
        chosen = _matching(names, head, "head")
        heads, note = {p: "named by head=" for p in chosen if num_wide(p) > 1}, ""

    adamw = dict(algorithm="adamw", lr=adamw_lr, betas=adamw_betas, eps=adamw_eps, weight_decay=adamw_weight_decay)
    matrix = {key: value for key, value in dict(lr=lr, weight_decay=weight_decay).items() if value is not None}
    defaults: dict[str, dict[str, Any]] = {
        **dict.fromkeys(MATRIX_GROUPS, matrix),
        "embedding": adamw | dict(lr=adamw_lr if embedding_lr is None else embedding_lr),
        "head": adamw | dict(lr=adamw_lr if head_lr is None else head_lr),
        "vector": adamw | dict(weight_decay=0.0),
        "adamw": adamw,
    }  # fmt: skip
    groups: dict[str, dict[str, Any]] = {}
    rows, unknown = [], []
    for p, holders in layers.items():
        if not p.requires_grad:
            continue
        choice = decided.get(p) or choose(p, holders, heads, split_fused)
        if choice and p in overridden and p not in decided:
            more = overridden[p]
            choice = Choice(choice.group, choice.options | more.options, f"{choice.why}; {more.why}")
        layer_names = " + ".join(dict.fromkeys(type(layer.module).__name__ for layer in holders))
        name, shape = holders[0].name, tuple(p.shape)
        if choice is None:
            unknown.append((name, shape, layer_names))
            continue
        options = defaults[choice.group] | choice.options
        group = groups.setdefault(f"{choice.group} {options}", dict(name=choice.group, params=[], **options))
        group["params"].append((name, p))
        shown = {k: v for k, v in options.items() if k not in ("algorithm", "betas", "eps")}
        rows.append(Row(name, shape, layer_names, choice.group, shown, choice.why))
    if unknown:
        raise ValueError(_say_how(unknown, [layer.name for holders in layers.values() for layer in holders]))
    if not rows:
        raise ValueError(f"{type(model).__name__} has no parameter that requires a gradient")
    return ParamGroups(sorted(groups.values(), key=lambda group: GROUPS.index(group["name"])), rows, note)


def _layers(model: nn.Module) -> Iterator[tuple[Layer, Tensor]]:
    """Every parameter, as often as it has names, in the order of model.named_parameters()."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, module in modules.items():
        parent, _, attribute_in_parent = path.rpartition(".")
        for attribute, p in module.named_parameters(recurse=False, remove_duplicate=False):
            name = f"{path}.{attribute}" if path else attribute
            yield Layer(name, attribute, module, modules[parent] if path else None, attribute_in_parent), p


def _check_sortable(model: nn.Module, layers: dict[Tensor, list[Layer]]) -> None:
    lazy = [layers[p][0].name for p in layers if nn.parameter.is_lazy(p)]
    if lazy:
        raise ValueError(f"{', '.join(lazy)} have no shape yet: run the model once before param_groups()")
    if any(is_of(module, "torch", "FullyShardedDataParallel") for module in model.modules()):
        raise ValueError(
            "FullyShardedDataParallel flattens the weights of layers, so that they are matrices no longer: use "
            "DistributedDataParallel, or an optimizer with process_group, which shards the state"
        )


# ---- what a layer does with a parameter ----


# ---- the output head ----


# ---- what the user says ----


def _overridden(
    names: Mapping[Tensor, list[str]], overrides: Mapping[str, str | Mapping[str, Any]]
) -> dict[Tensor, Choice]:
    """The parameters that overrides name, with what they say."""
    chosen: dict[Tensor, Choice] = {}
    for pattern, wanted in overrides.items():
        for p in _matching(names, pattern, "overrides"):
            if p not in chosen and p.requires_grad:
                chosen[p] = _as_choice(names[p][0], p, pattern, wanted)
    return chosen


def _matching(names: Mapping[Tensor, list[str]], pattern: str, argument: str) -> list[Tensor]:
    """The parameters one of whose names matches: whole, or if there is none, from a dot on."""
    for wanted in (pattern, f"*.{pattern}"):
        found = [p for p in names if any(fnmatchcase(name, wanted) for name in names[p])]
        if found:
            return found
    ends = {end for p in names for name in names[p] for end in (name, _pattern(name), *_ends(_pattern(name)))}
    close = difflib.get_close_matches(pattern, sorted(ends), n=3)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    raise ValueError(f"{argument}: {pattern!r} matches no parameter of the model{hint}")


def _as_choice(name: str, p: Tensor, pattern: str, wanted: str | Mapping[str, Any]) -> Choice:
    """What a value of overrides means for this parameter.

    Raises:
        ValueError: no such group, or options that do not fit the shape.
    """
    why = f"overrides[{pattern!r}]"
    if isinstance(wanted, str):
        if wanted not in GROUPS:
            raise ValueError(f"{why} is {wanted!r}; a group is one of {', '.join(GROUPS)}, or a dict of options")
        options: dict[str, Any] = dict(view=wanted) if wanted in MATRIX_GROUPS else {}
    else:
        options = dict(wanted)
    if "params" in options or "name" in options:
        raise ValueError(f"{why} gives options of a group, among which params and name may not be")
    if (algorithm := options.get("algorithm", "adamw")) != "adamw":
        raise ValueError(f"{why} has algorithm {algorithm!r}; it is adamw, or absent for a matrix")
    if not options.keys() & {"algorithm", "view", "layout", "split"} and not isinstance(wanted, str):
        return Choice("", options, why)
    if "algorithm" in options or wanted in GROUPS[len(MATRIX_GROUPS) :]:
        return Choice(wanted if isinstance(wanted, str) else "adamw", options, why)

    view, layout, split = options.pop("view", "matrix"), options.pop("layout", "out_in"), options.pop("split", None)
    if view not in MATRIX_GROUPS or layout not in LAYOUTS:
        raise ValueError(
            f"{why}: view is {view!r} and layout {layout!r}; a view is one of {', '.join(MATRIX_GROUPS)}, a layout one "
            f"of {', '.join(LAYOUTS)}"
        )
    fits = {"matrix": p.ndim == 2, "conv": p.ndim >= 3, "experts": p.ndim == 3}[view]
    if not fits or not p.is_floating_point():
        raise ValueError(f"{why}: {name} of shape {tuple(p.shape)} and dtype {p.dtype} cannot be seen as {view}")
    outputs = {"out_in": p.shape[p.ndim - 2 if view == "experts" else 0],
               "in_out": prod(p.shape[2:] if view == "experts" else p.shape[1:])}[layout]  # fmt: skip
    if split is not None and (sum(split) != outputs or min(split) < 1):
        raise ValueError(f"{why}: split {tuple(split)} of {name} must be sizes that sum to its {outputs} outputs")
    own = dict(view=view) if view != "matrix" else {}
    own |= dict(layout=layout) if layout != "out_in" else {}
    own |= dict(split=tuple(split)) if split is not None else {}
    return Choice(view, own | options, why)


def _say_how(unknown: list[tuple[str, tuple[int, ...], str]], names: list[str]) -> str:
    """The message for parameters whose use is not known. names are all of the model."""
    by_pattern: dict[str, list[tuple[str, tuple[int, ...], str]]] = {}
    for row in unknown:
        by_pattern.setdefault(_pattern(row[0]), []).append(row)
    shown: Counter[tuple[str, tuple[int, ...], str]] = Counter()
    for pattern, rows in by_pattern.items():
        matched = {name for name in names if fnmatchcase(name, pattern)}
        is_exact = matched == {name for name, _, _ in rows} and len({len(shape) for _, shape, _ in rows}) == 1
        shown.update((pattern if is_exact and len(rows) > 1 else name, shape, layer) for name, shape, layer in rows)
    lines = [f"    {name}  {shape}  of {layer}" + f"  x {n}" * (n > 1) for (name, shape, layer), n in shown.items()]
    kinds = {2: '"matrix"', 3: 'dict(view="experts")'}
    overrides = {name: kinds.get(len(shape), '"conv"') for name, shape, _ in shown}
    return "\n".join([
        "param_groups cannot know what these parameters are used for, since their layers are none it knows:",
        *lines,
        'Say it: "adamw", or what kind of matrix they are. For instance, if they are weights:',
        "overrides={",
        *(f'    "{name}": {kind},' for name, kind in overrides.items()),
        "}",
        'Options: layout="in_out" if the input comes before the output, and split=(n1, n2) if one weight holds several '
        "matrices, n1 and n2 outputs of the whole.",
    ])  # fmt: skip


def _pattern(name: str) -> str:
    """The name with * for its numbers: layers.3.weight is layers.*.weight."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _alike(row: Row) -> tuple[str, str]:
    """What stands for the names and the shapes of rows that share a line of the table."""
    if len(row.shape) > 1:
        return _pattern(row.name), str(row.shape)
    return f"*.{row.name.rpartition('.')[2]}", f"{len(row.shape)}-D"


def _ends(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(1, len(parts))]


def _short(value: Any) -> str:
    if isinstance(value, tuple) and len(value) > 3 and len(set(value)) == 1:
        return f"{len(value)}x{value[0]}"
    return str(value).replace(" ", "")
