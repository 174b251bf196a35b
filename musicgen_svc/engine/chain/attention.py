# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""The attention of a step to a cache whose used length is on the device."""

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait  # type: ignore[import-untyped]

LEAST_SHARE = 64
"""The fewest positions that are worth a program of their own."""


@triton.jit(do_not_specialize=["capacity"])
def attend(
    query, keys, values, prefix_length, filled, text_length, out, sums, capacity,
    SELF: tl.constexpr, HEADS: tl.constexpr, HEAD: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr,
    LEAST: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Computes attention, with one program per part of the positions, head and row.

    The softmax is computed online: the sums are rescaled whenever a higher score is found (Milakov and
    Gimelshein, "Online normalizer calculation for softmax", 2018). Each part takes an equal share of the
    positions in use, so the cost depends on the length only.

    Args:
        query: SELF: [rows, 3, HEADS, HEAD], the query, the new key and the new value. Else the query
            [rows, HEADS, HEAD].
        keys, values: [rows, HEADS, capacity, HEAD]. SELF stores the new key and value at the last position.
        prefix_length, filled: [slots]. SELF reads positions [0, prefix_length + filled) of both rows of a
            slot.
        text_length: [2 * rows]. Else positions [0, text_length[2 * row]) are read; there may be none.
        out: one part: [rows, HEADS, HEAD] in the layers' dtype. More: [rows, HEADS, PARTS, HEAD] weighted
            sums in fp32, for `product.combined`.
        sums: [rows, HEADS, PARTS, 2] the highest score and the sum of the weights of each part.
    """
    part, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    reader = row * HEADS + head
    column = tl.arange(0, HEAD)
    offset = tl.arange(0, TILE)
    if OVERLAP:
        gdc_launch_dependents()

    # No launch of the same step writes what is read before the wait: the new key and value are left out.
    if SELF:
        length = (tl.load(prefix_length + row // 2) + tl.load(filled + row // 2)).to(tl.int32)
        length = tl.minimum(length, capacity)
        past = length - 1
    else:
        length = tl.load(text_length + 2 * row).to(tl.int32)
        past = length
    share = tl.maximum((length + PARTS - 1) // PARTS, LEAST)
    begin = tl.minimum(part * share, length)
    end = tl.minimum(begin + share, length)
    limit = tl.minimum(end, past)
    cache = reader.to(tl.int64) * capacity * HEAD
    keys += cache
    values += cache
    cells = (begin + offset)[:, None] * HEAD + column[None, :]
    key = tl.load(keys + cells, mask=((begin + offset) < limit)[:, None], other=0.0)
    value = tl.load(values + cells, mask=((begin + offset) < limit)[:, None], other=0.0)
    if OVERLAP:
        gdc_wait()

    own = query + row * ((3 if SELF else 1) * HEADS * HEAD) + head * HEAD + column
    scaled_query = tl.load(own).to(tl.float32) * (HEAD**-0.5)
    if SELF:
        new_key = tl.load(own + HEADS * HEAD)
        new_value = tl.load(own + 2 * HEADS * HEAD)
        last = past * HEAD + column
        stores = (column < HEAD) & (begin <= past) & (past < end)
        tl.store(keys + last, new_key, mask=stores)
        tl.store(values + last, new_value, mask=stores)
    highest = -1e30
    total = 0.0
    weighted = tl.zeros([HEAD], dtype=tl.float32)
    start = begin
    while start < end:
        present_key, present_value = key, value
        position = start + offset
        following = position + TILE
        cells = following[:, None] * HEAD + column[None, :]
        key = tl.load(keys + cells, mask=(following < limit)[:, None], other=0.0)
        value = tl.load(values + cells, mask=(following < limit)[:, None], other=0.0)
        if SELF:
            newest = (position == past)[:, None]
            present_key = tl.where(newest, new_key[None, :], present_key)
            present_value = tl.where(newest, new_value[None, :], present_value)
        score = tl.sum(scaled_query[None, :] * present_key.to(tl.float32), axis=1)
        score = tl.where(position < end, score, -float("inf"))
        new_highest = tl.maximum(highest, tl.max(score, axis=0))
        weight = tl.exp(score - new_highest)
        rescale = tl.exp(highest - new_highest)
        total = total * rescale + tl.sum(weight, axis=0)
        weighted = weighted * rescale + tl.sum(weight[:, None] * present_value.to(tl.float32), axis=0)
        highest = new_highest
        start += TILE

    if PARTS == 1:
        # The highest score has weight 1, so the sum is below 1 only without positions, where `weighted` is 0.
        tl.store(out + reader * HEAD + column, (weighted / tl.maximum(total, 1.0)).to(out.dtype.element_ty))
    else:
        own_part = reader * PARTS + part
        tl.store(out + own_part * HEAD + column, weighted)
        tl.store(sums + own_part * 2, highest)
        tl.store(sums + own_part * 2 + 1, total)
