"""Matrix products x @ W.T for the few rows of a decoding step, in which reading W takes most of the time.

On a CPU this module calls kernels by name, because `F.linear` chooses a GEMM that is made for many rows. With
two rows of fp32, oneDNN's kernel reads the weights three to four times as fast as that GEMM, without packing.
FBGEMM's kernels read packed weights, which have fewer bytes: fp16 weights, multiplied by fp32 activations in
fp32, and int8 weights, multiplied by activations that are rounded to 8 bits.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Precision = Literal["reference", "float16", "bfloat16", "int8"]
"""How the matrices are stored and multiplied. `scripts/bench` reports the accuracy and speed of each.

`reference`: exact numbers, multiplied in the model's precision. On a CPU that is fp32. There a matrix is
    packed in float16 if float16 can represent all of its numbers, which is so if the checkpoint is stored in
    float16. Any other matrix is shared with the model.
`float16`: like `reference`, but every matrix is rounded to float16. Layers on a GPU are float16 already.
`bfloat16`: a second copy in bfloat16, multiplied in bfloat16.
`int8`: a second copy in 8 bits, with one scale per output channel. FBGEMM also rounds each row of the input
    to 8 bits. Elsewhere the input is not rounded, and only the kernels of `chain` are fast.
"""


class Matrix(NamedTuple):
    """A weight as it is stored."""

    weight: Tensor
    """[out, in]"""
    scales: Tensor | None = None
    """[out] in fp32, by which the rows of an int8 weight are multiplied. None for any other weight."""


class Projection:
    """The product with one weight without a bias: [..., in] -> [..., out] in the dtype of the input.

    Attributes:
        matrix: the weight, which the kernels of `chain` read; None if it is packed for a CPU.
        row_wise: whether each row is computed by itself, so that no bit of it depends on the other rows.
    """

    def __init__(
        self, product: Callable[[Tensor], Tensor], matrix: Matrix | None = None, *, row_wise: bool = False
    ) -> None:
        """Makes the product from the function that computes it."""
        self._product = product
        self.matrix = matrix
        self.row_wise = row_wise

    def __call__(self, x: Tensor) -> Tensor:
        """Multiplies [..., in] by the weight."""
        return self._product(x)


def projection(weight: Tensor, precision: Precision) -> Projection:
    """Makes the product with a weight [out, in] without a bias.

    Args:
        weight: [out, in], which may be referenced or copied.
        precision: how the weight is stored and multiplied.
    """
    if precision == "bfloat16":
        return _bfloat16(weight)
    if precision == "int8":
        return _int8(weight)
    if precision == "float16" or packs_float16(weight):
        return _float16(weight)
    return _plain(weight)


def packs_float16(weight: Tensor) -> bool:
    """Whether `reference` packs a matrix in float16, because this loses nothing."""
    return uses_fbgemm(weight) and _fits_float16(weight)


def _plain(weight: Tensor) -> Projection:
    """Makes the product in the dtype of the weight, which is referenced."""
    matrix = Matrix(weight)
    if weight.device.type == "cpu" and weight.dtype == torch.float32 and torch._C._has_mkldnn:
        return Projection(lambda x: _onednn(x, weight), matrix)
    return Projection(lambda x: F.linear(x, weight), matrix)


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    """Multiplies [..., in] by a weight [out, in] with oneDNN's kernel."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")  # type: ignore[no-any-return]


def _bfloat16(weight: Tensor) -> Projection:
    """Makes the product in bfloat16, with a packed weight if the CPU supports it."""
    rounded = weight.to(torch.bfloat16)
    if weight.device.type != "cpu" or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return Projection(lambda x: F.linear(x.to(torch.bfloat16), rounded).to(x.dtype), Matrix(rounded))
    packed = torch.ops.mkldnn._reorder_linear_weight(rounded, 2)
    return Projection(lambda x: _onednn(x.to(torch.bfloat16), packed).to(x.dtype))


def _float16(weight: Tensor) -> Projection:
    """Makes the product with a weight that is rounded to float16, packed if FBGEMM can be used."""
    if not uses_fbgemm(weight):
        return _plain(weight if _fits_float16(weight) else _rounded(weight))
    packed = torch.ops.quantized.linear_prepack_fp16(weight, None)
    multiply = torch.ops.quantized.linear_dynamic_fp16
    return Projection(lambda x: multiply(x, packed), row_wise=True)


def _fits_float16(weight: Tensor) -> bool:
    """Whether float16 can represent all numbers of a weight.

    The weight is compared in pieces that fit a CPU cache: new memory for the whole copy would cost more time
    than the comparison.
    """
    return all(torch.equal(rows, _rounded(rows)) for rows in torch.split(weight, 64))


def _rounded(weight: Tensor) -> Tensor:
    """Rounds numbers to float16, in the dtype of the weight."""
    return weight.to(torch.float16).to(weight.dtype)


def _int8(weight: Tensor) -> Projection:
    """Makes the product with a weight that is rounded to 8 bits.

    Without FBGEMM the weight is converted to the dtype of the input in each product, which takes longer than
    a product in that dtype.
    """
    scales = (weight.float().abs().amax(dim=1) / 127).clamp_min(torch.finfo(torch.float32).tiny)  # [out]
    if not uses_fbgemm(weight):
        rounded = (weight.float() / scales[:, None]).round().to(torch.int8)
        return Projection(
            lambda x: F.linear(x, (rounded * scales[:, None]).to(x.dtype)), Matrix(rounded, scales)
        )
    zeros = torch.zeros(len(scales), dtype=torch.long)
    quantized = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(quantized, None)
    # Without VNNI, FBGEMM adds two products in 16 bits: the input may have 7 bits only, or the sum saturates.
    steps, zero = (127, 128) if torch.cpu._is_vnni_supported() else (63, 64)
    multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32

    def product(x: Tensor) -> Tensor:
        # Each row has its own scale: with a common scale, a request's tokens would depend on other requests.
        row_max = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True).clamp_min_(1e-30)
        return multiply(x / row_max, 1 / steps, zero, packed).mul_(row_max)  # type: ignore[no-any-return]

    return Projection(product, row_wise=True)


def uses_fbgemm(weight: Tensor) -> bool:
    """Whether a product can use FBGEMM by `torch.ops.quantized`, which supports fp32 inputs only."""
    supported = weight.device.type == "cpu" and weight.dtype == torch.float32
    return supported and torch.backends.quantized.engine in ("x86", "fbgemm")


def merged(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Merges weights of the same shape [n, D] into one tensor [len(parameters) * n, D].

    The parameters become views of it, unless they are already.
    """
    first = parameters[0].data
    consecutive = [first.data_ptr() + index * first.nbytes for index in range(len(parameters))]
    one_storage = len({weight.untyped_storage().data_ptr() for weight in parameters}) == 1
    if one_storage and [weight.data_ptr() for weight in parameters] == consecutive:
        return first.as_strided((len(parameters) * len(first), first.shape[1]), (first.shape[1], 1))
    whole = torch.cat([weight.data for weight in parameters])
    for weight, part in zip(parameters, torch.split(whole, len(first)), strict=True):
        weight.data = part
    return whole
