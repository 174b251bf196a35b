# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""The matrix products of a step, with what stands before and after them, in one launch each.

In front of a product stands a LayerNorm, or the combination of the parts of an attention, or nothing. Behind
it stands a GELU, or the addition to the residual stream, or nothing. A program multiplies a few rows of the
weight by all rows of the input, on tensor cores: the weight is the side of 16 rows, the input the narrow
side. Each warp multiplies its share of the inputs, and the warps' results are added up at the end.
"""

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait  # type: ignore[import-untyped]


@triton.jit
def product(
    x, sums, norm_weight, norm_bias, weight, scales, out, eps,
    FRONT: tl.constexpr, BEHIND: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr, ROW_STEP: tl.constexpr, HEAD: tl.constexpr, PARTS: tl.constexpr, DTYPE: tl.constexpr,
    INT8: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, WARPS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Computes behind(front(x) @ (weight * scales).T), with one program per `BLOCK_OUT` outputs.

    Args:
        x: what the product reads, by `FRONT`. "norm": the residual stream [., INPUTS] in fp32, whose
            LayerNorm is multiplied. "parts": [ROWS, heads, PARTS, HEAD] in fp32, as `attention.attend` leaves
            them. "plain": [ROWS, INPUTS] in `DTYPE`.
        sums: [ROWS, heads, PARTS, 2] of the parts.
        norm_weight, norm_bias, eps: of the LayerNorm.
        weight: [OUTPUTS, INPUTS].
        scales: [OUTPUTS], if the weight is `INT8`.
        out: by `BEHIND`. "store" and "gelu": [ROWS, OUTPUTS] in `DTYPE`. "add": the residual stream [.,
            OUTPUTS] in fp32, to which the product is added.
        ROW_STEP: row i of the product is row i * ROW_STEP of the residual stream.
        DTYPE: the layers' dtype, to which the front's result and the product are rounded.
        OVERLAP: whether the launch may start before the one in front of it has ended.
    """
    LIVE: tl.constexpr = max(triton.next_power_of_2(ROWS), 2)  # for one row, ptxas would spill registers
    COLUMNS: tl.constexpr = max(LIVE, 8)  # the narrow side of a tensor core's tile
    DEPTH: tl.constexpr = BLOCK_IN // WARPS
    output = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    index = tl.arange(0, WARPS)[:, None] * DEPTH + tl.arange(0, DEPTH)[None, :]  # [WARPS, DEPTH]
    row = tl.arange(0, LIVE)
    if OVERLAP:
        gdc_launch_dependents()

    # Before the wait, only what no step writes may be read.
    cells = weight + output.to(tl.int64)[None, :, None] * INPUTS + index[:, None, :]
    own = (output < OUTPUTS)[None, :, None]
    tile = tl.load(cells, mask=own & (index < INPUTS)[:, None, :], other=0.0)  # [WARPS, BLOCK_OUT, DEPTH]
    if INT8:
        scale = tl.load(scales + output, mask=output < OUTPUTS, other=0.0)
    if FRONT == "norm":
        column = tl.arange(0, BLOCK_IN)
        gain = tl.load(norm_weight + column, mask=column < INPUTS, other=0.0)
        shift = tl.load(norm_bias + column, mask=column < INPUTS, other=0.0)
    if OVERLAP:
        gdc_wait()

    result = tl.arange(0, COLUMNS)
    targets = out + output[:, None] + result[None, :] * ((ROW_STEP if BEHIND == "add" else 1) * OUTPUTS)
    stored = (output < OUTPUTS)[:, None] & (result < ROWS)[None, :]
    if BEHIND == "add":
        before = tl.load(targets, mask=stored, other=0.0)
    total = tl.zeros([WARPS, BLOCK_OUT, COLUMNS], dtype=tl.float32)
    if FRONT == "norm":
        tl.static_assert(BLOCK_IN >= INPUTS)
        readable = (row < ROWS)[:, None] & (column < INPUTS)[None, :]
        stream = tl.load(x + row[:, None] * (ROW_STEP * INPUTS) + column[None, :], mask=readable, other=0.0)
        front = normed(stream, gain, shift, eps, INPUTS).to(DTYPE)
        total = multiplied(tile, front, total, WARPS, COLUMNS)
    elif FRONT == "parts":
        tl.static_assert(BLOCK_IN >= INPUTS)
        front = combined(x, sums, INPUTS // HEAD, HEAD, PARTS, ROWS, LIVE, BLOCK_IN // HEAD).to(DTYPE)
        total = multiplied(tile, tl.reshape(front, [LIVE, BLOCK_IN]), total, WARPS, COLUMNS)
    else:
        column = tl.arange(0, BLOCK_IN)
        for start in tl.range(0, INPUTS, BLOCK_IN, num_stages=1):
            present = tile
            following = start + BLOCK_IN + index
            tile = tl.load(cells + start + BLOCK_IN, mask=own & (following < INPUTS)[:, None, :], other=0.0)
            readable = (row < ROWS)[:, None] & (start + column < INPUTS)[None, :]
            front = tl.load(x + row[:, None] * INPUTS + (start + column)[None, :], mask=readable, other=0.0)
            total = multiplied(present, front, total, WARPS, COLUMNS)

    value = tl.sum(total, axis=0)  # [BLOCK_OUT, COLUMNS]
    if INT8:
        value = value * scale[:, None]
    if tile.dtype == tl.bfloat16:
        value = value.to(tl.bfloat16)  # as a product in bfloat16 rounds it
    value = value.to(DTYPE)
    if BEHIND == "add":
        tl.store(targets, before + value.to(tl.float32), mask=stored)
    elif BEHIND == "gelu":
        wide = value.to(tl.float32)
        wide = 0.5 * wide * (1.0 + tl.erf(wide * 0.7071067811865476))
        tl.store(targets, wide.to(DTYPE), mask=stored)
    else:
        tl.store(targets, value, mask=stored)


@triton.jit
def norm(
    x, norm_weight, norm_bias, out, eps,
    DIM: tl.constexpr, BLOCK: tl.constexpr, ROW_STEP: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Computes the LayerNorm of row i * ROW_STEP of the residual stream, with one program per row i."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    in_range = column < DIM
    if OVERLAP:
        gdc_launch_dependents()
    gain = tl.load(norm_weight + column, mask=in_range, other=0.0)
    shift = tl.load(norm_bias + column, mask=in_range, other=0.0)
    if OVERLAP:
        gdc_wait()
    stream = tl.load(x + row * (ROW_STEP * DIM) + column, mask=in_range, other=0.0)
    value = normed(stream[None, :], gain, shift, eps, DIM)
    tl.store(out + (row * DIM + column)[None, :], value.to(out.dtype.element_ty), mask=in_range[None, :])


@triton.jit
def normed(stream, gain, shift, eps, DIM: tl.constexpr):
    """Computes a LayerNorm in fp32: [rows, columns] -> the same shape.

    The columns beyond DIM must be zero, and are zero in the result if `gain` and `shift` are zero there. The
    sum and the sum of squares are computed in one reduction, because each one waits for all warps.
    """
    total, squares = tl.split(tl.sum(tl.join(stream, stream * stream), axis=1))
    mean = total / DIM
    spread = tl.rsqrt(squares / DIM - mean * mean + eps)
    return (stream - mean[:, None]) * spread[:, None] * gain[None, :] + shift[None, :]


@triton.jit
def combined(
    parts, sums, HEADS: tl.constexpr, HEAD: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, LIVE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Combines the parts of an attention: [LIVE, WIDE, HEAD] in fp32, zero beyond ROWS and HEADS."""
    row, head = tl.arange(0, LIVE)[:, None, None], tl.arange(0, WIDE)[None, :, None]
    exists = (row < ROWS) & (head < HEADS)
    own = (row * HEADS + head) * PARTS + tl.arange(0, PARTS)[None, None, :]  # [LIVE, WIDE, PARTS]
    high = tl.load(sums + own * 2, mask=exists, other=-1e30)
    total = tl.load(sums + own * 2 + 1, mask=exists, other=0.0)
    cells = own[:, :, :, None] * HEAD + tl.arange(0, HEAD)[None, None, None, :]
    found = tl.load(parts + cells, mask=exists[:, :, :, None], other=0.0)
    weight = tl.exp(high - tl.max(high, axis=2)[:, :, None])
    # The highest score has weight 1, so the sum is below 1 only without positions, where `found` is 0.
    weight = weight / tl.maximum(tl.sum(total * weight, axis=2), 1.0)[:, :, None]
    return tl.sum(found * weight[:, :, :, None], axis=2)


@triton.jit
def multiplied(tile, front, total, WARPS: tl.constexpr, COLUMNS: tl.constexpr):
    """Adds a product to `total` [WARPS, BLOCK_OUT, COLUMNS], with each warp's share of the inputs apart.

    Args:
        tile: [WARPS, BLOCK_OUT, DEPTH] of the weight. int8 numbers are converted to the dtype of `front`,
            which represents them exactly.
        front: [LIVE, WARPS * DEPTH]. It is repeated up to COLUMNS rows, because a tensor core has no fewer.
    """
    LIVE: tl.constexpr = front.shape[0]
    DEPTH: tl.constexpr = front.shape[1] // WARPS
    if tile.dtype == tl.int8:
        tile = tile.to(front.dtype)
    front = tl.permute(tl.reshape(front.to(tile.dtype), [LIVE, WARPS, DEPTH]), [1, 2, 0])
    if LIVE < COLUMNS:
        front = tl.broadcast_to(front[:, :, None, :], [WARPS, DEPTH, COLUMNS // LIVE, LIVE])
        front = tl.reshape(front, [WARPS, DEPTH, COLUMNS])
    return tl.dot(tile, front, total, input_precision="ieee")
