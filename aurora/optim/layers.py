"""What is known of layers, by their class: which of their parameters are matrices, and how these lie in memory."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import Tensor, nn

MATRIX_GROUPS = ("matrix", "conv", "experts")  # the views of a weight, too
GROUPS = (*MATRIX_GROUPS, "embedding", "head", "vector", "adamw")
LAYOUTS = ("out_in", "in_out")
NORMS = (
    nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.LocalResponseNorm,
    nn.modules.batchnorm._NormBase,  # BatchNorm, SyncBatchNorm and InstanceNorm of all dimensions
)  # fmt: skip
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONVS_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
GATES = {nn.LSTM: 4, nn.LSTMCell: 4, nn.GRU: 3, nn.GRUCell: 3, nn.RNN: 1, nn.RNNCell: 1}
# Parameters that a layer of another package holds itself: package, class, parameter, group, why.
PARAMETERS = (
    ("transformers", "*Embedding*", "*", "embedding", "held by an embedding layer"),
    ("transformers", "*", "relative_position_bias_table", "embedding", "positions"),
    ("transformers", "*Router", "weight", "matrix", "linear layer of a router"),
    ("transformers", "*", "A_log", "vector", "decay rates of a state space"),
    ("mamba_ssm", "*", "A_log", "vector", "decay rates of a state space"),
    ("timm", "*", "pos_embed", "embedding", "positions"),
    ("torchvision", "*", "pos_embedding", "embedding", "positions"),
)
# Layers whose outputs are those of several: package, class that holds the layer, its name there, and how many equal
# parts, or 0 for q, k, v one after the other. q is then as wide as the attention's output projection takes.
FUSED = (
    ("transformers", "*Attention", "qkv", 0),
    ("transformers", "Phi3Attention", "qkv_proj", 0),
    ("transformers", "Phi4MultimodalAttention", "qkv_proj", 0),
    ("transformers", "ModernBertAttention", "Wqkv", 0),
    ("transformers", "MptAttention", "Wqkv", 0),
    ("transformers", "DbrxAttention", "Wqkv", 0),
    ("timm", "*Attention", "qkv", 0),
    ("torchvision", "*Attention*", "qkv", 0),
    ("transformers", "*", "gate_up_proj", 2),
    ("transformers", "MambaMixer", "in_proj", 2),
    ("transformers", "FalconMambaMixer", "in_proj", 2),
    ("transformers", "JambaMambaMixer", "in_proj", 2),
)
OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "proj", "projection", "Wo")


class Layer(NamedTuple):
    """A parameter as one layer holds it. A tied parameter has several."""

    name: str
    attribute: str
    module: nn.Module
    parent: nn.Module | None
    attribute_in_parent: str


class Choice(NamedTuple):
    """The group of a parameter ("" leaves it open), its options where they are not the default, and why."""

    group: str
    options: dict[str, Any]
    why: str


def choose(p: Tensor, holders: list[Layer], heads: Mapping[Tensor, str], split_fused: bool) -> Choice | None:
    """The group of a parameter, or None where it is not known."""
    if any(isinstance(layer.module, nn.Embedding | nn.EmbeddingBag) for layer in holders):
        return Choice("embedding", {}, "tied to the head" if p in heads else "embedding layer")
    if p in heads:
        return Choice("head", {}, heads[p])
    if p.numel() == 0:
        return Choice("vector", {}, "has no elements")
    if num_wide(p) < 2:
        return Choice("vector", {}, "vector or scalar" if p.ndim < 2 else "at most one dimension above 1")
    if not p.is_floating_point():
        return Choice("adamw", {}, f"{p.dtype}: matrices must be real")
    choices = [choose_in(layer, tuple(p.shape)) for layer in holders]
    choice = choices[0]
    if choice is None or any(other is None or other[:2] != choice[:2] for other in choices):
        return None
    if "split" in choice.options and not split_fused:
        options = {key: value for key, value in choice.options.items() if key != "split"}
        return Choice(choice.group, options, choice.why + ", unsplit")
    return choice


def choose_in(layer: Layer, shape: tuple[int, ...]) -> Choice | None:
    """What one layer does with a parameter of at least two dimensions above 1."""
    module, attribute = layer.module, layer.attribute
    if isinstance(module, NORMS):
        return Choice("vector", {}, "norm")
    if isinstance(module, nn.Linear):
        return _fused(layer, shape[0], shape[1], {}) if attribute == "weight" else None
    if is_of(module, "transformers", "Conv1D") and hasattr(module, "nf"):
        return _fused(layer, shape[1], shape[0], dict(layout="in_out")) if attribute == "weight" else None
    if isinstance(module, CONVS) and attribute == "weight":
        return _conv(module, shape)
    if isinstance(module, CONVS_TRANSPOSED) and attribute == "weight":
        if module.groups == 1:
            return Choice("conv", dict(view="conv", layout="in_out"), "transposed convolution")
        return Choice("adamw", {}, "transposed convolution with groups")
    if isinstance(module, nn.MultiheadAttention) and attribute == "in_proj_weight":
        return Choice("matrix", _split(shape[0], 3), "q, k, v")
    if isinstance(module, nn.MultiheadAttention) and attribute.endswith("_proj_weight"):
        return Choice("matrix", {}, "linear layer of attention")
    for kind, gates in GATES.items():
        if isinstance(module, kind) and attribute.startswith("weight_"):
            is_projection = attribute.startswith("weight_hr")
            return Choice("matrix", {} if is_projection else _split(shape[0], gates), "recurrent layer")
    if is_of(module, "transformers", "*Experts") and hasattr(module, "is_transposed"):
        return _experts(module, attribute, shape)
    for package, cls, known, group, why in PARAMETERS:
        if is_of(module, package, cls) and fnmatchcase(attribute, known):
            return Choice(group, {}, why)
    return None


def is_of(module: nn.Module | None, package: str, pattern: str) -> bool:
    """Whether a module is of a class of this package that the pattern matches, or of a subclass of one."""
    return any(cls.__module__.split(".")[0] == package and fnmatchcase(cls.__name__, pattern)
               for cls in type(module).__mro__)  # fmt: skip


def _split(size: int, parts: int) -> dict[str, Any]:
    return dict(split=(size // parts,) * parts) if parts > 1 else {}


def _fused(layer: Layer, out_features: int, in_features: int, options: dict[str, Any]) -> Choice:
    """A linear layer: one matrix, or several where the order of its outputs is known."""
    why = "linear layer" if not options else "linear layer, (in, out)"
    parent, attribute = layer.parent, layer.attribute_in_parent
    if is_of(parent, "transformers", "*Attention") and attribute == "c_attn" and options:  # GPT-2 and its kin
        parts = out_features // in_features
        return Choice("matrix", options | _split(out_features, parts), "q, k, v" if parts == 3 else "k, v")
    for package, cls, known, parts in FUSED:
        if attribute == known and is_of(parent, package, cls):
            if parts:
                return Choice("matrix", options | _split(out_features, parts), f"{parts} linear layers")
            siblings = [getattr(parent, name, None) for name in OUTPUT_PROJECTIONS]
            q = next((sibling.in_features for sibling in siblings if isinstance(sibling, nn.Linear)), out_features)
            if q < out_features and (out_features - q) % 2 == 0:
                kv = (out_features - q) // 2
                return Choice("matrix", options | dict(split=(q, kv, kv)), "q, k, v")
    if "qkv" in attribute.lower() or attribute in ("query_key_value", "c_attn"):
        why = "q, k, v, unsplit: their order is not known"
    return Choice("matrix", options, why)


def _conv(module: Any, shape: tuple[int, ...]) -> Choice:
    outputs, inputs = shape[0] // module.groups, shape[1]  # of one group
    if module.groups > 1 and inputs == 1:
        return Choice("vector", {}, "depthwise convolution: a filter each, no matrix")
    if outputs == 1:
        return Choice("vector", {}, "convolution with one output in each group")
    return Choice("conv", dict(view="conv", **_split(shape[0], module.groups)), "convolution")


def _experts(module: Any, attribute: str, shape: tuple[int, ...]) -> Choice | None:
    """The experts of transformers 5 and later, which say how their weights lie."""
    if attribute.endswith("_bias"):
        return Choice("vector", {}, "biases of experts")
    if attribute not in ("gate_up_proj", "up_proj", "down_proj") or len(shape) != 3:
        return None
    options: dict[str, Any] = dict(view="experts", **(dict(layout="in_out") if module.is_transposed else {}))
    if attribute != "gate_up_proj":
        return Choice("experts", options, "linear layers of experts")
    if not module.is_concatenated:
        return Choice("experts", options, "linear layers of experts, gate and up interleaved: unsplit")
    out_features = shape[2 if module.is_transposed else 1]
    return Choice("experts", options | _split(out_features, 2), "gate and up of experts")


def num_wide(p: Tensor) -> int:
    return sum(size > 1 for size in p.shape)
