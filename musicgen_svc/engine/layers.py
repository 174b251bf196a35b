"""The transformer layers of the model, as functions that hold their weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musicgen_svc.engine.projections import Projection


class Norm:
    """A LayerNorm of the residual stream, computed in fp32.

    Attributes:
        weight, bias: [D] in fp32. They are copied only if the module has them in another dtype.
        eps: is added to the variance.
    """

    def __init__(self, module: nn.LayerNorm, dtype: torch.dtype) -> None:
        """Binds the weights of a module. `dtype`: the layers' dtype, in which the result is needed."""
        self.weight, self.bias = module.weight.detach().float(), module.bias.detach().float()
        self.eps = module.eps
        self._dtype = dtype

    def __call__(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """Adds to the residual stream, and normalizes the sum.

        Args:
            x: [..., D] the residual stream in fp32.
            delta: [..., D] what is added. None adds nothing.

        Returns:
            tuple: the sum in fp32, and its LayerNorm in the layers' dtype.
        """
        total = x if delta is None else x + delta
        return total, F.layer_norm(total, self.weight.shape, self.weight, self.bias, self.eps).to(self._dtype)


@dataclass(frozen=True)
class Layer:
    """One transformer layer, as functions that hold their weights."""

    norm: Norm
    qkv: Projection
    out: Projection
    cross_norm: Norm | None
    cross_query: Projection | None
    cross_key_value: Tensor | None  # [2 * D, D], only read in a prefill
    cross_out: Projection | None
    ff_norm: Norm
    ff_in: Projection
    ff_out: Projection


def bind_layer(
    layer: Any,
    make_projection: Callable[[Tensor], Projection],
    make_norm: Callable[[nn.LayerNorm], Norm],
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
