# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""The operations of `operations.py` as Triton kernels.

A step of one request computes two rows only, so most of its time is launches. Each kernel therefore does in
one launch what PyTorch does in several. The attention reads the used positions of a cache only. It reads
their number on the device, so that one recorded step is right for every position.

The kernels are compiled at their first launch, for each shape. If `TRITON_INTERPRET=1` is in the environment
when Triton is imported, they run on a CPU, slowly. The tests without a GPU use this.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from musicgen_svc.engine.operations import PLAIN, Attend, Operations
from musicgen_svc.engine.sampling_kernels import draw, launching_on

BLOCK = 128
"""The number of positions that one program reads at once."""

UNSPLIT = 512
"""Up to this extent in positions, one program per row and head reads the whole cache.

Beyond it the cache is split among programs, and a second launch combines their results.
"""

PROGRAMS = 2048
"""The number of programs that fills a large GPU.

The fewer (row, head) pairs there are, the more programs each cache is split among.
"""

FEW_ROWS = 64
"""The most rows of a decoding step: 2 per request, with up to 32 requests.

With more rows, the int8 weight is converted to the dtype of the input once for all rows.
"""


# --- residual and norm --------------------------------------------------------------------------


def add_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Adds to the residual stream and normalizes the sum in one launch, as `Operations.add_norm`."""
    dim = x.shape[-1]
    flat = x.reshape(-1, dim)
    added = flat if delta is None else delta.reshape(-1, dim)
    total = flat if delta is None else torch.empty(flat.shape, dtype=x.dtype, device=x.device)
    normed = torch.empty(flat.shape, dtype=dtype, device=x.device)
    assert added.shape == flat.shape and flat.stride(1) == added.stride(1) == 1, (flat.shape, added.shape)
    block = triton.next_power_of_2(dim)
    with launching_on(x.device):
        _add_norm[(len(flat),)](
            flat, added, weight, bias, total, normed, flat.stride(0), added.stride(0), eps,
            DIM=dim, BLOCK=block, ADD=delta is not None, num_warps=8 if block > 1024 else 4,
        )  # fmt: skip
    return (x if delta is None else total.view(x.shape)), normed.view(x.shape)


@triton.jit
def _add_norm(
    x, delta, weight, bias, total, normed, x_stride, delta_stride, eps,
    DIM: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Computes `add_norm`, with one program per row."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK)
    in_range = index < DIM
    value = tl.load(x + row * x_stride + index, mask=in_range, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(delta + row * delta_stride + index, mask=in_range, other=0.0).to(tl.float32)
        tl.store(total + row * DIM + index, value, mask=in_range)
    mean = tl.sum(value, axis=0) / DIM
    centred = tl.where(in_range, value - mean, 0.0)
    variance = tl.sum(centred * centred, axis=0) / DIM
    scaled = centred * (1.0 / tl.sqrt(variance + eps))
    scaled = scaled * tl.load(weight + index, mask=in_range, other=0.0)
    scaled = scaled + tl.load(bias + index, mask=in_range, other=0.0)
    tl.store(normed + row * DIM + index, scaled.to(normed.dtype.element_ty), mask=in_range)


# --- attention ----------------------------------------------------------------------------------


def attention(lengths: Tensor, extent: int) -> Attend:
    """Prepares the attention of one step, as `Operations.attention`.

    The extent decides among how many programs the work is split. The lengths decide what is read.
    """

    def attend(
        query: Tensor, keys: Tensor, values: Tensor, new: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Attends in one launch or two, as `Attend`."""
        rows, heads, _, head = query.shape
        key, value = (query, query) if new is None else new
        splits = splits_of(rows * heads, extent)
        out = query.new_empty(rows, heads, 1, head)
        # parts: each split's weighted sum of values. sums: its highest score and its sum of weights.
        parts = out if splits == 1 else query.new_empty(rows, heads, splits, head, dtype=torch.float32)
        sums = out if splits == 1 else query.new_empty(rows, heads, splits, 2, dtype=torch.float32)
        assert query.stride() == key.stride() == value.stride() and query.stride(3) == 1, query.stride()
        assert keys.stride() == values.stride() and keys.stride()[2:] == (head, 1), keys.stride()
        assert len(lengths) == rows and rows % len(keys) == 0, (lengths.shape, rows, keys.shape)
        assert new is None or rows == len(keys), (rows, keys.shape)
        split = BLOCK * triton.cdiv(triton.cdiv(extent, splits), BLOCK)
        width = triton.next_power_of_2(head)
        with launching_on(query.device):
            _attend[(rows, heads, splits)](
                query, key, value, keys, values, lengths, out, parts, sums,
                query.stride(0), query.stride(1), keys.stride(0), keys.stride(1), head**-0.5,
                SHARING=rows // len(keys), HEAD=head, WIDTH=width, SPLIT=split, BLOCK=BLOCK,
                STORE=new is not None, WHOLE=splits == 1,
            )  # fmt: skip
            if splits > 1:
                _combine[(rows, heads)](parts, sums, out, HEAD=head, WIDTH=width, SPLITS=splits)
        return out

    return attend


def splits_of(readers: int, extent: int) -> int:
    """Returns into how many parts each cache is split, a power of two.

    Args:
        readers: the number of (row, head) pairs.
        extent: an upper bound of the lengths, in positions.
    """
    if extent <= UNSPLIT:
        return 1
    wanted, possible = PROGRAMS // readers, extent // BLOCK
    return 1 << (max(min(wanted, possible), 1).bit_length() - 1)


@triton.jit
def _attend(
    query, new_keys, new_values, keys, values, lengths, out, parts, sums,
    row_stride, head_stride, cache_stride, cache_head_stride, scale,
    SHARING: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
    STORE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Computes attention, with one program per row, head and part of the positions.

    The softmax is computed online: the sums are rescaled whenever a higher score is found (Milakov and
    Gimelshein, "Online normalizer calculation for softmax", 2018). A part that begins beyond the length reads
    nothing. With STORE, the program whose part has the last position also writes the new key and value to the
    cache, and uses them from its registers.
    """
    row = tl.program_id(0).to(tl.int64)
    head, split = tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row).to(tl.int32)
    begin = split * SPLIT
    end = tl.minimum(begin + SPLIT, length)
    index = tl.arange(0, WIDTH)
    in_range = index < HEAD
    offsets = row * row_stride + head * head_stride + index
    cache = (row // SHARING) * cache_stride + head * cache_head_stride
    scaled_query = tl.load(query + offsets, mask=in_range, other=0.0).to(tl.float32) * scale
    if STORE:
        new_key = tl.load(new_keys + offsets, mask=in_range, other=0.0)
        new_value = tl.load(new_values + offsets, mask=in_range, other=0.0)
        own = in_range & (begin < length) & (length <= begin + SPLIT)
        tl.store(keys + cache + (length - 1) * HEAD + index, new_key, mask=own)
        tl.store(values + cache + (length - 1) * HEAD + index, new_value, mask=own)

    highest = -1e30
    total = 0.0
    weighted = tl.zeros([WIDTH], dtype=tl.float32)
    start = begin
    while start < end:
        position = start + tl.arange(0, BLOCK)
        used = position < end
        if STORE:
            used = used & (position < length - 1)
        cells = cache + position[:, None] * HEAD + index[None, :]
        readable = used[:, None] & in_range[None, :]
        key = tl.load(keys + cells, mask=readable, other=0.0).to(tl.float32)
        value = tl.load(values + cells, mask=readable, other=0.0).to(tl.float32)
        if STORE:
            last = (position == length - 1)[:, None]
            key = tl.where(last, new_key[None, :].to(tl.float32), key)
            value = tl.where(last, new_value[None, :].to(tl.float32), value)
        score = tl.sum(scaled_query[None, :] * key, axis=1)
        score = tl.where(position < end, score, -float("inf"))
        new_highest = tl.maximum(highest, tl.max(score, axis=0))
        weight = tl.exp(score - new_highest)
        rescale = tl.exp(highest - new_highest)
        total = total * rescale + tl.sum(weight, axis=0)
        weighted = weighted * rescale + tl.sum(weight[:, None] * value, axis=0)
        highest = new_highest
        start += BLOCK

    reader = row * tl.num_programs(1) + head
    if WHOLE:
        # The highest score has weight 1, so the sum is below 1 only without positions, where `weighted` is 0.
        weighted = weighted / tl.maximum(total, 1.0)
        tl.store(out + reader * HEAD + index, weighted.to(out.dtype.element_ty), mask=in_range)
    else:
        part = reader * tl.num_programs(2) + split
        tl.store(parts + part * HEAD + index, weighted, mask=in_range)
        tl.store(sums + part * 2, highest)
        tl.store(sums + part * 2 + 1, total)


@triton.jit
def _combine(parts, sums, out, HEAD: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr):
    """Combines the parts of `_attend`, with one program per row and head.

    A part without positions has the lowest possible score, and so the weight 0.
    """
    reader = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    part = reader * SPLITS + tl.arange(0, SPLITS)
    index = tl.arange(0, WIDTH)
    in_range = index < HEAD
    highest = tl.load(sums + part * 2)
    total = tl.load(sums + part * 2 + 1)
    weight = tl.exp(highest - tl.max(highest, axis=0))
    weighted = tl.load(parts + part[:, None] * HEAD + index[None, :], mask=in_range[None, :], other=0.0)
    weighted = tl.sum(weighted * weight[:, None], axis=0) / tl.maximum(tl.sum(total * weight, axis=0), 1.0)
    tl.store(out + reader * HEAD + index, weighted.to(out.dtype.element_ty), mask=in_range)


# --- product ------------------------------------------------------------------------------------


def int8_linear(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """Multiplies by an int8 weight in one launch, as `Operations.int8_linear`."""
    outputs, inputs = weight.shape
    flat = x.reshape(-1, inputs)
    rows = len(flat)
    if rows > FEW_ROWS:  # a prefill: the weight is converted once for all rows
        return PLAIN.int8_linear(x, weight, scales)
    assert flat.stride(1) == 1 and weight.is_contiguous() and scales.is_contiguous()
    out = x.new_empty(rows, outputs)
    block = 16 if outputs <= 2048 else 32  # larger blocks would leave processors of a large GPU idle
    with launching_on(x.device):
        _int8_linear[(triton.cdiv(outputs, block),)](
            flat, weight, scales, out, rows, outputs, flat.stride(0), INPUTS=inputs,
            ROWS=max(triton.next_power_of_2(rows), 16), BLOCK_OUT=block, BLOCK_IN=256, num_stages=3,
        )  # fmt: skip
    return out.view(*x.shape[:-1], outputs)


@triton.jit
def _int8_linear(
    x, weight, scales, out, rows, outputs, row_stride,
    INPUTS: tl.constexpr, ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """Computes `int8_linear`, with one program per block of outputs, for all rows.

    So the weight is read once, and converted in registers to the dtype of the input, which represents 8-bit
    integers exactly. The sums are in fp32 and are scaled at the end.
    """
    row = tl.arange(0, ROWS)
    output = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    cells = output.to(tl.int64)[None, :] * INPUTS
    total = tl.zeros([ROWS, BLOCK_OUT], dtype=tl.float32)
    for start in range(0, INPUTS, BLOCK_IN):
        index = start + tl.arange(0, BLOCK_IN)
        in_range = index < INPUTS
        inputs_block = tl.load(
            x + row[:, None] * row_stride + index[None, :],
            mask=(row < rows)[:, None] & in_range[None, :],
            other=0.0,
        )
        own = tl.load(
            weight + cells + index[:, None], mask=in_range[:, None] & (output < outputs)[None, :], other=0
        )
        total = tl.dot(inputs_block, own.to(inputs_block.dtype), total, input_precision="ieee")
    scale = tl.load(scales + output, mask=output < outputs, other=0.0)
    tl.store(
        out + row[:, None] * outputs + output[None, :],
        (total * scale[None, :]).to(out.dtype.element_ty),
        mask=(row < rows)[:, None] & (output < outputs)[None, :],
    )


class KernelOperations:
    """`Operations` as Triton kernels."""

    reads_lengths = True
    add_norm = staticmethod(add_norm)
    attention = staticmethod(attention)
    draw = staticmethod(draw)
    int8_linear = staticmethod(int8_linear)


KERNELS: Operations = KernelOperations()
