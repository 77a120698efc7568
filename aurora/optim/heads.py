"""Which parameters of a model make its outputs, for param_groups()."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .layers import Choice, Layer


def find_heads(
    model: nn.Module, layers: dict[Tensor, list[Layer]], decided: Mapping[Tensor, Choice]
) -> tuple[dict[Tensor, str], str]:
    """The weights of the output heads, each with why, and a note for the table if there are none.

    Raises:
        ValueError: several linear layers could be the head.
    """
    if any(choice.group == "head" for choice in decided.values()):
        return {}, ""
    heads: dict[Tensor, str] = {}
    inside: set[nn.Module] = set()
    for module in model.modules():
        if callable(getattr(type(module), "get_output_embeddings", None)):
            inside.update(module.modules())
            heads |= _heads_of_transformers(module)
    if heads:
        return heads, ""

    linears = [
        (p, layer.module) for p, holders in layers.items() for layer in holders
        if isinstance(layer.module, nn.Linear) and layer.attribute == "weight" and layer.module not in inside
    ]  # fmt: skip
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    if any(p is embedding.weight for p, _ in linears for embedding in embeddings):
        return {p: "tied" for p, _ in linears if any(p is e.weight for e in embeddings)}, ""
    linears = [(p, linear) for p, linear in linears if p not in decided and p.requires_grad]
    widths = _input_widths(model)
    sizes = {embedding.num_embeddings for embedding in embeddings}
    heads = {p: f"{m.out_features} outputs, as many as an embedding has entries"
             for p, m in linears if m.out_features in sizes - widths}  # fmt: skip
    if heads:
        return heads, ""
    if linears and (last := linears[-1][1]).out_features not in widths:
        return {linears[-1][0]: f"last linear layer; its {last.out_features} outputs are no layer's inputs"}, ""
    candidates = [layers[p][0].name for p, linear in linears if linear.out_features in sizes]
    if candidates:
        raise ValueError(
            f"param_groups cannot tell whether one of {', '.join(candidates)} is the output head: each has as many "
            f"outputs as an embedding has entries, but so have layers within the model. "
            f'Pass head="{candidates[-1]}", say, or head=None if there is none'
        )
    return {}, 'No output head was found. If there is one: param_groups(model, head="NAME.weight").'


def _heads_of_transformers(module: Any) -> dict[Tensor, str]:
    """What a model of transformers says of its own heads, for tokens or for classes."""
    try:
        output = module.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        output = None
    heads = {}
    if isinstance(getattr(output, "weight", None), Tensor):
        heads[output.weight] = "get_output_embeddings()"
    base = getattr(module, getattr(module, "base_model_prefix", "") or "_", None)
    num_labels = getattr(getattr(module, "config", None), "num_labels", None)
    others = [child for child in module.children() if child is not base]
    if isinstance(base, nn.Module):
        others = [inner for child in others for inner in child.modules()]
    for linear in others:
        if isinstance(linear, nn.Linear) and linear.out_features == num_labels:
            heads.setdefault(linear.weight, f"outside the base model, {num_labels} outputs as in config.num_labels")
    return heads


def _input_widths(model: nn.Module) -> set[int]:
    """How many inputs the layers of a model take."""
    keys = ("in_features", "in_channels", "embed_dim", "embedding_dim", "input_size")
    widths = {getattr(module, key, None) for module in model.modules() for key in keys}
    return {width for width in widths if isinstance(width, int)}
