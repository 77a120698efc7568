"""The forward pass of train_gpt.GPT again, in fewer passes over memory: the same function of the same parameters.

Layers that share their input are one matmul. What autograd would do with more memory or more passes is a single step
(functions.py). mirror.py says when it may be used.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .functions import BlockedAttention, ReluSquared, RotatedRMSNorm, SoftCapCrossEntropy, rms_norm

if TYPE_CHECKING:
    from train_gpt import GPT, MLP, Attention, Block


class FastForward:
    """Takes inputs and targets (B, T) to the summed loss, as the model that it is made of."""

    def __init__(self, model: "GPT", attention: str = "torch's"):
        """model: one that mirror.edits() finds unedited. attention: "blocked", or torch's own kernel."""
        self.model, self.is_blocked = model, attention == "blocked"
        self.rotations = []  # of each block, cosines and sines (seq_len, 1, K)
        for block in blocks_of(model):
            cos, sin = block.attention.rotary.cos_T1F, block.attention.rotary.sin_T1F
            self.rotations.append((torch.cat([cos, cos], dim=-1), torch.cat([sin, -sin], dim=-1)))

    def __call__(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """The loss, summed over the targets."""
        return self.loss(self.trunk(inputs_BT), targets_BT)

    def trunk(self, inputs_BT: Tensor) -> Tensor:
        model = self.model
        x = rms_norm(model.embed(inputs_BT).to(model.activation_dtype), model.embed_norm.gain)
        for block, rotation in zip(blocks_of(model), self.rotations, strict=True):
            x = self.block(x, block, rotation)
        return rms_norm(x, model.head_norm.gain)

    def loss(self, x_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        z_NV = self.model.head(x_BTD).flatten(0, 1)
        return SoftCapCrossEntropy.apply(z_NV, targets_BT.flatten(), self.model.softcap)

    def block(self, x: Tensor, block: "Block", rotation: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attention(rms_norm(x, block.attention_norm.gain), block.attention, rotation)
        return x + self.mlp(rms_norm(x, block.mlp_norm.gain), block.mlp)

    def attention(self, x_BTD: Tensor, attention: "Attention", rotation: tuple[Tensor, Tensor]) -> Tensor:
        tables = rotation[0][: x_BTD.size(1)], rotation[1][: x_BTD.size(1)]
        q, k, v = (x_BTHK.transpose(1, 2) for x_BTHK in self.heads(x_BTD, attention, tables))
        if self.is_blocked:
            y_BHTK = BlockedAttention.apply(q, k, v, attention.scale)
        else:
            y_BHTK = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=attention.scale)
        return attention.out(y_BHTK.transpose(1, 2).flatten(-2))

    def heads(self, x_BTD: Tensor, attention: "Attention", rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """Queries, keys and values (B, T, H, K)."""
        q_k_v = side_by_side(x_BTD, attention.q, attention.k, attention.v)
        q, k, v = q_k_v.unflatten(-1, (3, -1, attention.head_dim)).unbind(2)
        return RotatedRMSNorm.apply(q, *rotation), RotatedRMSNorm.apply(k, *rotation), v

    def mlp(self, x_BTD: Tensor, mlp: "MLP") -> Tensor:
        if mlp.gate is None:
            return mlp.down(ReluSquared.apply(mlp.up(x_BTD)))
        gate, up = side_by_side(x_BTD, mlp.gate, mlp.up).chunk(2, dim=-1)
        return mlp.down(F.silu(gate) * up)


def blocks_of(model: "GPT") -> Iterable["Block"]:
    return model.blocks  # type: ignore[return-value]  # torch's ModuleList does not say what it holds


def packed(x: Tensor, *layers: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Weight and bias, in the dtype of their input x, of layers that share it, one below the other."""
    weight = torch.cat([layer.weight for layer in layers]).type_as(x)
    has_bias = layers[0].bias is not None
    return weight, torch.cat([layer.bias for layer in layers]).type_as(x) if has_bias else None


def side_by_side(x: Tensor, *layers: nn.Linear) -> Tensor:
    """The outputs of layers that share their input, one after the other along the last dimension: one matmul."""
    return F.linear(x, *packed(x, *layers))
