"""x @ W.T for the few rows of a decoding step, where reading W is all that costs.

On a CPU oneDNN is asked for by name: for 2 rows of fp32 it streams the weights three to four times
as fast as the GEMM that `F.linear` chooses, from the same memory, without packing.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Precision = Literal["reference", "bfloat16"]
"""`reference`: the weights as they were loaded, shared with the model. `bfloat16`: a second, packed
copy in half of fp32's memory; changes what is generated, within what `scripts/bench` reports."""

Projection = Callable[[Tensor], Tensor]
"""[..., in] -> [..., out], in the dtype of the input."""


def projection(weight: Tensor, precision: Precision) -> Projection:
    """The product with one bias-free weight [out, in]."""
    if precision == "bfloat16":
        return _bfloat16(weight)
    if weight.device.type == "cpu" and weight.dtype == torch.float32 and torch._C._has_mkldnn:
        return lambda x: _onednn(x, weight)
    return lambda x: F.linear(x, weight)


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")  # type: ignore[no-any-return]


def _bfloat16(weight: Tensor) -> Projection:
    rounded = weight.to(torch.bfloat16)
    if weight.device.type != "cpu" or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return lambda x: F.linear(x.to(torch.bfloat16), rounded).to(x.dtype)
    packed = torch.ops.mkldnn._reorder_linear_weight(rounded, 2)
    return lambda x: _onednn(x.to(torch.bfloat16), packed).to(x.dtype)
