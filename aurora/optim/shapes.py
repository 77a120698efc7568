"""The matrices that a parameter holds: its own, a convolution's, the experts of a layer, the parts of a fused one.

Options of a parameter group say how its parameters are seen, where they are not one matrix (M, N) = (out, in) each:

    view = "conv"        (out, in, k...) as (out, in k...)
    view = "experts"     (E, ...): E matrices
    layout = "in_out"    matrices are (in, out), as in transformers' Conv1D; a transposed convolution's (in, out k...)
    split = (n1, n2)     a fused layer: its first n1 outputs are one matrix, the next n2 another
"""

from typing import Any

import torch
from torch import Tensor

from .fsdp import check_placements, is_dtensor

VIEWS = ("matrix", "conv", "experts")
LAYOUTS = ("out_in", "in_out")
SHAPE_OPTIONS = ("view", "layout", "split")


def check_shape(name: str, p: Tensor, group: dict[str, Any]) -> None:
    """Raise ValueError where the group's options do not say which matrices p holds, or p is none that rules update."""
    view, layout, split = group.get("view", "matrix"), group.get("layout", "out_in"), group.get("split")
    if view not in VIEWS or layout not in LAYOUTS:
        raise ValueError(
            f"view must be one of {', '.join(VIEWS)}, layout one of {', '.join(LAYOUTS)}; got {view, layout}"
        )
    if is_dtensor(p):
        check_placements(name, p)
    elif _is_wrapper(p):
        raise ValueError(f"{name} is a {type(p.data).__name__}; quantized parameters are not supported")
    is_plain = p.is_floating_point() and p.layout == torch.strided
    if not is_plain or not {"matrix": p.ndim == 2, "conv": p.ndim > 2, "experts": p.ndim == 3}[view]:
        raise ValueError(
            f"{name} is a {type(p.data).__name__} of shape {tuple(p.shape)} and dtype {p.dtype}, which view = {view!r} "
            "does not take: 'matrix' takes plain 2-D floating-point tensors, 'conv' more dimensions, 'experts' three; "
            'give others to a group with algorithm = "adamw"'
        )
    if split is not None and p.numel():
        outputs = matrix_shapes(p.shape, {**group, "split": None})[0][0]
        if not isinstance(split, tuple | list) or not split or min(split) < 1 or sum(split) != outputs:
            raise ValueError(f"{name}: the parts of split = {split} must sum to its {outputs} outputs")


def _is_wrapper(p: Tensor) -> bool:
    """Quantized weights: their data is another tensor's. A FakeTensor's is not."""
    return torch.utils._python_dispatch.is_traceable_wrapper_subclass(p.data)


def is_one_matrix(group: dict[str, Any]) -> bool:
    """Whether the parameters of the group are matrices (M, N) as they are."""
    return (
        group.get("view", "matrix") == "matrix" and group.get("layout", "out_in") == "out_in" and not group.get("split")
    )


def to_matrices(X: Tensor, group: dict[str, Any]) -> list[Tensor]:
    """The matrices (M, N) of a tensor of a parameter's shape; of a contiguous one, views."""
    if is_one_matrix(group):
        return [X]
    X_EMN = X.flatten(1) if group.get("view") == "conv" else X
    X_EMN = X_EMN if X_EMN.ndim == 3 else X_EMN.unsqueeze(0)
    X_EMN = X_EMN.mT if group.get("layout") == "in_out" else X_EMN
    split = group.get("split")
    return [part for X_MN in X_EMN for part in (X_MN.split(list(split)) if split else [X_MN])]


def matrix_shapes(shape: torch.Size, group: dict[str, Any]) -> list[tuple[int, int]]:
    """(M, N) of each matrix."""
    rows, columns = shape[-2:] if group.get("view") != "conv" else (shape[0], shape[1:].numel())
    rows, columns = (columns, rows) if group.get("layout") == "in_out" else (rows, columns)
    experts = shape[0] if group.get("view") == "experts" else 1
    return [(part, columns) for _ in range(experts) for part in (group.get("split") or [rows])]


def joined_rows(parts: list[Tensor]) -> Tensor:
    """State of several matrices in one tensor: one below the other, flat where their rows have different lengths."""
    is_even = len({part.shape[1:] for part in parts}) == 1
    return torch.cat(parts if is_even else [part.flatten() for part in parts])


def split_rows(joined: Tensor, parts: list[Tensor]) -> list[Tensor]:
    """Views of what joined_rows() makes of tensors with the shapes of these."""
    is_even = len({part.shape[1:] for part in parts}) == 1
    views = joined.split([len(part) if is_even else part.numel() for part in parts])
    return [view.view(part.shape) for view, part in zip(views, parts, strict=True)]
