"""x @ W.T for the few rows of a decoding step, where reading W is nearly all that costs.

On a CPU kernels are asked for by name, since `F.linear` chooses a GEMM made for many rows. For two
rows of fp32 oneDNN streams the weights three to four times as fast, from the same memory, without
packing. FBGEMM's have the weights packed once, in fewer bytes, and stream those as fast: half
precision, which fp32 activations are multiplied with in fp32, and int8, with 8-bit activations.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from musicgen_svc.engine.operations import PLAIN, Operations

Precision = Literal["reference", "float16", "bfloat16", "int8"]
"""How the layers' matrices are kept and multiplied; `scripts/bench` reports what each changes.

`reference`: as they were stored, multiplied in the model's precision. On a CPU that is fp32: a matrix whose
    numbers all fit float16, as in a checkpoint stored so, is packed as that, any other one is shared
    with the model as it is.
`float16`: the same, with what does not fit rounded. Layers on a GPU are float16 already.
`bfloat16`: a second copy in bfloat16, multiplied in bfloat16.
`int8`: a second copy in eight bits, with one scale per output channel. FBGEMM rounds the input to eight
    bits as well, each row by itself; elsewhere it stays as it is, and only kernels of our own are fast.
"""

Projection = Callable[[Tensor], Tensor]
"""[..., in] -> [..., out], in the dtype of the input."""


def projection(weight: Tensor, precision: Precision, operations: Operations = PLAIN) -> Projection:
    """The product with one bias-free weight [out, in]."""
    if precision == "bfloat16":
        return _bfloat16(weight)
    if precision == "int8":
        return _int8(weight, operations)
    if precision == "float16" or packs_float16(weight):
        return _float16(weight)
    return _plain(weight)


def packs_float16(weight: Tensor) -> bool:
    """Whether `reference` keeps a matrix in float16, as nothing is lost by it."""
    return _fbgemm(weight) and _fits_float16(weight)


def _plain(weight: Tensor) -> Projection:
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


def _float16(weight: Tensor) -> Projection:
    if not _fbgemm(weight):
        return _plain(weight if _fits_float16(weight) else _rounded(weight))
    packed = torch.ops.quantized.linear_prepack_fp16(weight, None)
    multiply = torch.ops.quantized.linear_dynamic_fp16
    return lambda x: multiply(x, packed)


def _fits_float16(weight: Tensor) -> bool:
    """Looked at in pieces that stay in a cache: fresh memory for all of it costs more than to look."""
    return all(torch.equal(rows, _rounded(rows)) for rows in torch.split(weight, 64))


def _rounded(weight: Tensor) -> Tensor:
    return weight.to(torch.float16).to(weight.dtype)


def _int8(weight: Tensor, operations: Operations) -> Projection:
    scales = (weight.float().abs().amax(dim=1) / 127).clamp_min(torch.finfo(torch.float32).tiny)  # [out]
    if not _fbgemm(weight):
        rounded = (weight.float() / scales[:, None]).round().to(torch.int8)
        return lambda x: operations.int8_linear(x, rounded, scales)
    zeros = torch.zeros(len(scales), dtype=torch.long)
    quantized = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(quantized, None)
    # Without VNNI two products are added up in 16 bits first: seven bits of the input fit there.
    steps, zero = (127, 128) if torch.cpu._is_vnni_supported() else (63, 64)
    multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32

    def product(x: Tensor) -> Tensor:
        # One scale per row: with one for all, what a request generates would depend on the others.
        loudest = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True).clamp_min_(1e-30)
        return multiply(x / loudest, 1 / steps, zero, packed).mul_(loudest)  # type: ignore[no-any-return]

    return product


def _fbgemm(weight: Tensor) -> bool:
    """Whether `torch.ops.quantized` is FBGEMM's, which knows fp32 inputs alone."""
    known = weight.device.type == "cpu" and weight.dtype == torch.float32
    return known and torch.backends.quantized.engine in ("x86", "fbgemm")
