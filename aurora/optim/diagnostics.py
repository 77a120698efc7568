"""What an optimizer does to the neurons of an MLP: evenness of its updates, leverage, and neurons that are dead.

A neuron is a row of the up-projection (and of SwiGLU's gate) and a column of the down-projection; matrices are given
here with their M neurons as rows, so a down-projection transposed. All results are float64.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# A row counts as starved below this share of an even row's energy (squared norm) or leverage.
STARVED_FRAC = 0.1
# A neuron counts as dead when its part in its layer's output is, as rms over tokens, below this of the mean one's.
DEAD_FRAC = 0.01
# A neuron of ReLU^2 counts as silent when it is active on at most this share of the tokens.
SILENT_FRAC = 0.001
# Directions whose singular value is below this share of the largest are rounding errors of float32.
RANK_TOLERANCE = 1e-6
QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)
# Of histograms of leverage, in units of an even row's: four bins a decade, and one for what lies below and above.
LEVERAGE_EDGES = tuple(10 ** (k / 4) for k in range(-12, 5))


def wide(X: Tensor) -> Tensor:
    """As float64; on the host where the device is an Apple GPU, which has none."""
    return (X.cpu() if X.device.type == "mps" else X).double()


def row_energies(X_MN: Tensor) -> Tensor:
    """(M,) squared norms of the rows."""
    return wide(X_MN).square().sum(dim=1)


def leverage_scores(X_MN: Tensor) -> Tensor:
    """(M,) squared row norms of the left singular vectors of X: what polar(X) gives its rows. They sum to the rank.

    Even leverage is min(1, N / M). A row of zeros has none.
    """
    X = wide(X_MN)
    gram = X.T @ X if X.size(0) >= X.size(1) else X @ X.T
    squares, vectors = on_host_if_need_be(torch.linalg.eigh, gram)
    is_kept = squares > squares[-1] * RANK_TOLERANCE**2
    if X.size(0) < X.size(1):
        return (vectors * is_kept).square().sum(dim=1)
    scale = torch.where(is_kept, squares.clamp(min=torch.finfo(torch.float64).tiny).rsqrt(), 0.0)
    return ((X @ vectors) * scale).square().sum(dim=1)


def leverage_histogram(relative_M: Tensor) -> list[int]:
    """How many rows have a leverage, in units of an even one, in each bin; an edge belongs to the bin above it."""
    edges = torch.tensor(LEVERAGE_EDGES, dtype=relative_M.dtype, device=relative_M.device)
    bins = torch.bucketize(relative_M, edges, right=True)
    return torch.bincount(bins, minlength=len(LEVERAGE_EDGES) + 1).tolist()


def starved(shares_M: Tensor, even: float | Tensor) -> Tensor:
    """(M,) bool: energies or leverage below STARVED_FRAC of an even row's."""
    return shares_M < STARVED_FRAC * even


def norm_quantiles(energies_M: Tensor) -> tuple[float, list[float]]:
    """Coefficient of variation of the row norms, and their QUANTILES in units of their mean; zeros if all rows are."""
    norms = energies_M.sqrt()
    mean = norms.mean()
    if mean == 0:
        return 0.0, [0.0] * len(QUANTILES)
    levels = torch.tensor(QUANTILES, dtype=torch.float64, device=norms.device)
    return (norms.std(correction=0) / mean).item(), (norms / mean).quantile(levels).tolist()


def effective_rank(W_MN: Tensor) -> float:
    """exp of the entropy of the singular values' shares (Roy and Vetterli 2007), from 1 to min(M, N); 0 for zeros."""
    W = wide(W_MN)
    squares = on_host_if_need_be(torch.linalg.eigvalsh, W.T @ W if W.size(0) >= W.size(1) else W @ W.T)
    values = squares.clamp(min=0).sqrt()
    if values.sum() == 0:
        return 0.0
    shares = values / values.sum()
    return torch.special.entr(shares).sum().exp().item()


def dead_neurons(activations: Tensor, down_DM: Tensor) -> Tensor:
    """(M,) bool: neurons whose part in the layer's output, rms activation x norm of its column, is next to nothing.

    activations: (..., M), what the down-projection multiplies. In a layer that puts out nothing at all, none is.
    """
    parts_M = column_norms(activations) * column_norms(down_DM)
    return parts_M < DEAD_FRAC * parts_M.mean()


def silent_neurons(activations: Tensor, is_gated: bool) -> Tensor:
    """(M,) bool: active on at most SILENT_FRAC of the tokens, or, gated, rms at most DEAD_FRAC of the layer's mean."""
    if is_gated:
        norms_M = column_norms(activations)
        return norms_M <= DEAD_FRAC * norms_M.mean()
    is_active = activations.reshape(-1, activations.size(-1)) > 0
    return is_active.sum(dim=0) <= SILENT_FRAC * is_active.size(0)


def column_norms(X: Tensor) -> Tensor:
    """(M,) norms over all but the last dimension of (..., M)."""
    return torch.linalg.vector_norm(wide(X.reshape(-1, X.size(-1))), dim=0)


def on_host_if_need_be(decompose: Callable[[Tensor], Any], gram: Tensor) -> Any:
    """The decomposition of a symmetric matrix: GPUs' solvers do not always converge, and no look is worth a run."""
    try:
        return decompose(gram)
    except torch.linalg.LinAlgError:
        found = decompose(gram.cpu())
        return found.to(gram.device) if isinstance(found, Tensor) else [part.to(gram.device) for part in found]
