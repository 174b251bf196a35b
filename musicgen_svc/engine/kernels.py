# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""The plain operations of `operations.py` as Triton kernels, with the same signatures.

A step of one request reads two rows: what each of these costs is its launch. So they do at once what
PyTorch does in several launches, and read, of a cache, only what is in use, whose length they find on
the device: one recorded step serves every position.

The kernels are compiled at their first launch, for each shape. With `TRITON_INTERPRET=1` in the
environment when Triton is imported they run on a CPU, slowly, which is how they are tested without
a GPU.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from musicgen_svc.engine.operations import PLAIN, Attend, Operations
from musicgen_svc.engine.sampling_kernels import draw, launching_on

BLOCK = 128
"""Positions that one program reads at once."""

UNSPLIT = 512
"""Positions up to which one program per row and head reads alone, without a second launch to combine."""

PROGRAMS = 2048
"""Programs needed to fill a large GPU.

With fewer (row, head) pairs the cache is split among more programs.
"""

FEW_ROWS = 64
"""Rows of a decoding step: 2 per request, up to 32 requests.

Above this, the weight is widened once for all rows.
"""


# --- residual and norm --------------------------------------------------------------------------


def add_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
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
    """One program per row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < DIM
    value = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(delta + row * delta_stride + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(total + row * DIM + at, value, mask=inside)
    mean = tl.sum(value, axis=0) / DIM
    centred = tl.where(inside, value - mean, 0.0)
    variance = tl.sum(centred * centred, axis=0) / DIM
    scaled = centred * (1.0 / tl.sqrt(variance + eps))
    scaled = scaled * tl.load(weight + at, mask=inside, other=0.0)
    scaled = scaled + tl.load(bias + at, mask=inside, other=0.0)
    tl.store(normed + row * DIM + at, scaled.to(normed.dtype.element_ty), mask=inside)


# --- attention ----------------------------------------------------------------------------------


def attention(lengths: Tensor, extent: int) -> Attend:
    """`extent` bounds the lengths. It decides how the work is split, not what is read."""

    def attend(
        query: Tensor, keys: Tensor, values: Tensor, new: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        rows, heads, _, head = query.shape
        key, value = (query, query) if new is None else new
        splits = splits_of(rows * heads, extent)
        out = query.new_empty(rows, heads, 1, head)
        # What each split found, not yet divided by its sum; and its highest score, and that sum.
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
    """Into how many parts a cache is split, a power of two. `readers`: rows times heads."""
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
    """One program per row, head and part of the positions: a softmax that is scaled anew as it goes.

    A part that begins beyond the length reads nothing. The row's own key and value go from here into
    the cache, by the program that reads them: from its registers, not from memory.
    """
    row = tl.program_id(0).to(tl.int64)
    head, split = tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row).to(tl.int32)
    begin = split * SPLIT
    end = tl.minimum(begin + SPLIT, length)
    at = tl.arange(0, WIDTH)
    inside = at < HEAD
    mine = row * row_stride + head * head_stride + at
    cache = (row // SHARING) * cache_stride + head * cache_head_stride
    asked = tl.load(query + mine, mask=inside, other=0.0).to(tl.float32) * scale
    if STORE:
        new_key = tl.load(new_keys + mine, mask=inside, other=0.0)
        new_value = tl.load(new_values + mine, mask=inside, other=0.0)
        own = inside & (begin < length) & (length <= begin + SPLIT)
        tl.store(keys + cache + (length - 1) * HEAD + at, new_key, mask=own)
        tl.store(values + cache + (length - 1) * HEAD + at, new_value, mask=own)

    highest = -1e30
    total = 0.0
    found = tl.zeros([WIDTH], dtype=tl.float32)
    start = begin
    while start < end:
        position = start + tl.arange(0, BLOCK)
        used = position < end
        if STORE:
            used = used & (position < length - 1)
        cells = cache + position[:, None] * HEAD + at[None, :]
        readable = used[:, None] & inside[None, :]
        key = tl.load(keys + cells, mask=readable, other=0.0).to(tl.float32)
        value = tl.load(values + cells, mask=readable, other=0.0).to(tl.float32)
        if STORE:
            last = (position == length - 1)[:, None]
            key = tl.where(last, new_key[None, :].to(tl.float32), key)
            value = tl.where(last, new_value[None, :].to(tl.float32), value)
        score = tl.sum(asked[None, :] * key, axis=1)
        score = tl.where(position < end, score, -float("inf"))
        higher = tl.maximum(highest, tl.max(score, axis=0))
        weight = tl.exp(score - higher)
        shrink = tl.exp(highest - higher)
        total = total * shrink + tl.sum(weight, axis=0)
        found = found * shrink + tl.sum(weight[:, None] * value, axis=0)
        highest = higher
        start += BLOCK

    reader = row * tl.num_programs(1) + head
    if WHOLE:
        # The highest score weighs 1: less is in a row without positions only, and there `found` is 0.
        found = found / tl.maximum(total, 1.0)
        tl.store(out + reader * HEAD + at, found.to(out.dtype.element_ty), mask=inside)
    else:
        part = reader * tl.num_programs(2) + split
        tl.store(parts + part * HEAD + at, found, mask=inside)
        tl.store(sums + part * 2, highest)
        tl.store(sums + part * 2 + 1, total)


@triton.jit
def _combine(parts, sums, out, HEAD: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr):
    """One program per row and head. Parts without positions have the lowest score, and weigh nothing."""
    reader = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    part = reader * SPLITS + tl.arange(0, SPLITS)
    at = tl.arange(0, WIDTH)
    inside = at < HEAD
    highest = tl.load(sums + part * 2)
    total = tl.load(sums + part * 2 + 1)
    weight = tl.exp(highest - tl.max(highest, axis=0))
    found = tl.load(parts + part[:, None] * HEAD + at[None, :], mask=inside[None, :], other=0.0)
    found = tl.sum(found * weight[:, None], axis=0) / tl.maximum(tl.sum(total * weight, axis=0), 1.0)
    tl.store(out + reader * HEAD + at, found.to(out.dtype.element_ty), mask=inside)


# --- product ------------------------------------------------------------------------------------


def int8_linear(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    outputs, inputs = weight.shape
    flat = x.reshape(-1, inputs)
    rows = len(flat)
    if rows > FEW_ROWS:  # a prefill: the weight is multiplied out once for all of it
        return PLAIN.int8_linear(x, weight, scales)
    assert flat.stride(1) == 1 and weight.is_contiguous() and scales.is_contiguous()
    out = x.new_empty(rows, outputs)
    block = 16 if outputs <= 2048 else 32  # or there are fewer programs than a large GPU has processors
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
    """One program per block of outputs, for all rows: the weight is read once, and widened in registers.

    Eight bits fit the input's dtype exactly. Sums are in fp32, and get their scale at the end.
    """
    row = tl.arange(0, ROWS)
    output = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    cells = output.to(tl.int64)[None, :] * INPUTS
    total = tl.zeros([ROWS, BLOCK_OUT], dtype=tl.float32)
    for start in range(0, INPUTS, BLOCK_IN):
        at = start + tl.arange(0, BLOCK_IN)
        known = at < INPUTS
        given = tl.load(
            x + row[:, None] * row_stride + at[None, :],
            mask=(row < rows)[:, None] & known[None, :],
            other=0.0,
        )
        own = tl.load(
            weight + cells + at[:, None], mask=known[:, None] & (output < outputs)[None, :], other=0
        )
        total = tl.dot(given, own.to(given.dtype), total, input_precision="ieee")
    scale = tl.load(scales + output, mask=output < outputs, other=0.0)
    tl.store(
        out + row[:, None] * outputs + output[None, :],
        (total * scale[None, :]).to(out.dtype.element_ty),
        mask=(row < rows)[:, None] & (output < outputs)[None, :],
    )


class KernelOperations:
    """Operations as Triton kernels."""

    reads_lengths = True
    add_norm = staticmethod(add_norm)
    attention = staticmethod(attention)
    draw = staticmethod(draw)
    int8_linear = staticmethod(int8_linear)


KERNELS: Operations = KernelOperations()
