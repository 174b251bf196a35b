"""The transformer layers of the model, as functions that hold their weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from musicgen_svc.engine.operations import Operations
from musicgen_svc.engine.projections import Projection

type AddNorm = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""Takes the residual stream [..., D] in fp32 and the previous block's result [..., D], and gives their sum in
fp32 and the LayerNorm of the sum in the layers' dtype. The addition is done here because the norm reads the
sum anyway."""


@dataclass(frozen=True)
class Layer:
    """One transformer layer, as functions that hold their weights."""

    norm: AddNorm
    qkv: Projection
    out: Projection
    cross_norm: AddNorm | None
    cross_query: Projection | None
    cross_key_value: Tensor | None  # [2 * D, D], only read in a prefill
    cross_out: Projection | None
    ff_norm: AddNorm
    ff_in: Projection
    ff_out: Projection


def bind_layer(
    layer: Any,
    make_projection: Callable[[Tensor], Projection],
    make_norm: Callable[[nn.LayerNorm], AddNorm],
) -> Layer:
    """Binds the weights of one of audiocraft's `StreamingTransformerLayer`s."""
    cross = layer.cross_attention
    dim = layer.linear1.in_features
    return Layer(
        norm=make_norm(layer.norm1),
        qkv=make_projection(layer.self_attn.in_proj_weight),
        out=make_projection(layer.self_attn.out_proj.weight),
        cross_norm=None if cross is None else make_norm(layer.norm_cross),
        cross_query=None if cross is None else make_projection(cross.in_proj_weight[:dim]),
        cross_key_value=None if cross is None else cross.in_proj_weight[dim:],
        cross_out=None if cross is None else make_projection(cross.out_proj.weight),
        ff_norm=make_norm(layer.norm2),
        ff_in=make_projection(layer.linear1.weight),
        ff_out=make_projection(layer.linear2.weight),
    )


def bind_add_norm(module: nn.LayerNorm, operations: Operations, dtype: torch.dtype) -> AddNorm:
    """Binds the weights of a LayerNorm in fp32. They are copied only if they are in fp16."""
    weight, bias = module.weight.detach().float(), module.bias.detach().float()
    return lambda x, delta: operations.add_norm(x, delta, weight, bias, module.eps, dtype)
