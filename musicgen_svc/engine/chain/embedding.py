# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""The residual stream at the beginning of a step: the embeddings of the last column and its position."""

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from triton.language.extra.cuda import gdc_launch_dependents  # type: ignore[import-untyped]


@triton.jit(do_not_specialize=["column_stride", "capacity"])
def embed(
    columns, filled, prefix_length, embeddings, positions, stream, column_stride, capacity,
    CODEBOOKS: tl.constexpr, CARD: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Adds up the embeddings of a slot's last column, with one program per slot and BLOCK numbers.

    It is the first launch of a step, and starts only when all earlier work has ended. So the later launches
    of the step may read what earlier steps wrote without waiting.

    Args:
        columns: [slots, CODEBOOKS, column_stride] tokens.
        filled: [slots] the last column is filled - 1.
        prefix_length: [slots] positions before the first column.
        embeddings: [CODEBOOKS, CARD + 1, DIM], added up in their dtype.
        positions: [positions, DIM] in fp32.
        stream: [2 * slots, DIM] in fp32; both rows of a slot are the same.
        capacity: the number of positions that a cache holds.
    """
    slot = tl.program_id(0)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_range = index < DIM
    if OVERLAP:
        gdc_launch_dependents()
    last = tl.load(filled + slot) - 1
    position = tl.minimum(tl.load(prefix_length + slot) + last, capacity - 1)
    first = columns + slot * CODEBOOKS * column_stride + last
    value = tl.load(embeddings + tl.load(first) * DIM + index, mask=in_range, other=0.0)
    for codebook in tl.static_range(1, CODEBOOKS):
        token = tl.load(first + codebook * column_stride) + codebook * (CARD + 1)
        value += tl.load(embeddings + token * DIM + index, mask=in_range, other=0.0)
    value = value.to(tl.float32) + tl.load(positions + position * DIM + index, mask=in_range, other=0.0)
    tl.store(stream + 2 * slot * DIM + index, value, mask=in_range)
    tl.store(stream + (2 * slot + 1) * DIM + index, value, mask=in_range)
