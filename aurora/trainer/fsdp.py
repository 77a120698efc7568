"""Runs with train.shard = "fsdp2": torch's fully_shard splits the model by rows, and its state with it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._composable import checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

import aurora
from aurora.config import Config
from aurora.errors import Exit, HarnessError
from aurora.optim.fsdp import is_dtensor, local, split_like
from aurora.trainer.ranks import Ranks


def check_fsdp(config: Config, has_dump: bool) -> None:
    """Raise HarnessError for what cannot be had together with train.shard = "fsdp2", or without it."""
    if config.train.shard != "fsdp2":
        if config.train.recompute:
            message = f"train.recompute = true, but train.shard = {config.train.shard!r}; set it to 'fsdp2'"
            raise HarnessError(Exit.CONFIG, message)
        return
    why = ""
    if not aurora.is_ours(aurora.find_rule(config.rule)):
        why = f"{config.rule} may need whole matrices"
    elif config.train.compile == "on":
        why = 'train.compile = "on" cannot be had with it, since the model runs eager'
    elif has_dump:
        why = "--dump-momentum cannot be had with it"
    if why:
        raise HarnessError(Exit.CONFIG, f"train.shard = 'fsdp2', but {why}; set it to 'owners'")


def recompute_blocks(model: nn.Module) -> None:
    """Keep a block's input alone for its backward pass, and compute the block again there; names stay as they are."""
    for block in getattr(model, "blocks", []):
        checkpoint(block)


def split_model(model: nn.Module, config: Config, ranks: Ranks) -> None:
    """Split every block by rows over all ranks, and what is around the blocks; sums of gradients stay sums.

    Blocks travel in the dtype of the activations, to which their layers round anyway, and gradients in float32, of a
    float32 sum. The embedding is looked up in float32.
    """
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    in_blocks = MixedPrecisionPolicy(
        param_dtype=getattr(torch, config.model.activation_dtype), reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in getattr(model, "blocks", []):
        fully_shard(block, mesh=mesh, mp_policy=in_blocks)
    fully_shard(model, mesh=mesh)
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.set_force_sum_reduction_for_comms(True)
            part.set_gradient_divide_factor(1.0)


def whole(value: Any) -> Any:
    """A DTensor whole, on the CPU; nested dicts and lists with such. Collective: on all ranks at once."""
    if isinstance(value, dict):
        return {key: whole(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [whole(entry) for entry in value]
    full: Any = value
    return full.full_tensor().cpu() if is_dtensor(value) else value


def load_weights(model: nn.Module, saved: dict[str, Tensor]) -> None:
    """model.load_state_dict() of weights that are whole, or rows."""
    own = model.state_dict()
    if own.keys() != saved.keys():
        raise ValueError(f"its weights are {', '.join(saved)}, not {', '.join(own)}")
    for name, p in own.items():
        if saved[name].shape != p.shape:
            raise ValueError(f"{name} is of shape {tuple(saved[name].shape)}, not {tuple(p.shape)}")
        local(p).copy_(local(saved[name] if is_dtensor(saved[name]) else split_like(p, saved[name])))
