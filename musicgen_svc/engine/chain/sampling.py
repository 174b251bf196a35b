# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""The draw of a column in three launches, where PyTorch makes about eighty.

They draw the tokens of `engine.sampling.draw_counted`, except that probabilities may differ by rounding.
"""

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait  # type: ignore[import-untyped]

from musicgen_svc.engine.sampling import SlotParameters

PER_SLOT = (*SlotParameters._fields, "filled", "end", "columns")
"""The kernels' parameters of which each slot has its own.

The kernels are not specialized on their alignment, or Triton would compile one for each offset of a slot.
"""


@triton.jit(do_not_specialize_on_alignment=PER_SLOT)
def soften(
    logits, guidance, temperature, filled, probabilities, most_likely, column,
    GREEDY_BELOW: tl.constexpr, CARD: tl.constexpr, ROW: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Computes guidance and softmax, with the rounding of `sampling.mix`, and the most likely token.

    There is one program per slot and codebook.

    Args:
        logits: [slots, 2, codebooks, CARD], the conditional row first.
        guidance, temperature, filled: [slots].
        probabilities: [slots, codebooks, CARD] in fp32.
        most_likely: [slots, codebooks] tokens.
        column: [slots] a copy of `filled`, which the programs of `draw` read while one of them counts.
        ROW: a power of two, at least CARD.
    """
    slot, codebook = tl.program_id(0), tl.program_id(1)
    codebooks = tl.num_programs(1)
    dtype = logits.dtype.element_ty
    token = tl.arange(0, ROW)
    in_range = token < CARD
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = logits + (slot * 2 * codebooks + codebook) * CARD + token
    conditional = tl.load(row, mask=in_range, other=0.0).to(tl.float32)
    null = tl.load(row + codebooks * CARD, mask=in_range, other=0.0).to(tl.float32)
    difference = (conditional - null).to(dtype).to(tl.float32)
    scaled_difference = (difference * tl.load(guidance + slot)).to(dtype).to(tl.float32)
    mixed = tl.where(in_range, (null + scaled_difference).to(dtype).to(tl.float32), -float("inf"))
    cell = slot * codebooks + codebook
    tl.store(most_likely + cell, tl.minimum(tl.argmax(mixed, axis=0), CARD - 1))
    tl.store(column + slot, tl.load(filled + slot), mask=codebook == 0)

    divisor = tl.load(temperature + slot)
    divisor = tl.where(divisor < GREEDY_BELOW, 1.0, divisor)
    scaled = tl.div_rn(mixed, divisor).to(dtype).to(tl.float32)
    weight = tl.exp(scaled - tl.max(scaled, axis=0))
    tl.store(probabilities + cell * CARD + token, weight / tl.sum(weight, axis=0), mask=in_range)


@triton.jit
def order(
    probabilities, ordered, tokens,
    CARD: tl.constexpr, TOKENS: tl.constexpr, ROW: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Sorts the probabilities in descending order, with one program per slot and codebook and TOKENS tokens.

    A program counts for each of its tokens how many tokens come before it: that is its place. Of equally
    likely tokens the one with the lower index comes first, as in a stable sort.

    Args:
        probabilities: [slots * codebooks, CARD] in fp32, none of them negative.
        ordered: [slots * codebooks, CARD] the same in descending order.
        tokens: [slots * codebooks, CARD] the token of each place.
        ROW: a power of two, at least CARD.
    """
    row = tl.program_id(0) * CARD
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    other = tl.arange(0, ROW)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    probability = tl.load(probabilities + row + token, mask=token < CARD, other=0.0)
    other_probability = tl.load(probabilities + row + other, mask=other < CARD, other=0.0)
    # The bits of floats that are not negative are in the order of the floats.
    key = (probability.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (ROW - token)
    other_key = (other_probability.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (ROW - other)
    before = (other_key[None, :] > key[:, None]) & (other < CARD)[None, :]
    place = row + tl.sum(before.to(tl.int32), axis=1)
    tl.store(ordered + place, probability, mask=token < CARD)
    tl.store(tokens + place, token, mask=token < CARD)


@triton.jit(do_not_specialize=["last_column"], do_not_specialize_on_alignment=PER_SLOT)
def draw(
    ordered, tokens, most_likely, column, temperature, top_k, top_p, seed, filled, end, columns, last_column,
    UNKNOWN: tl.constexpr, GREEDY_BELOW: tl.constexpr, CARD: tl.constexpr, ROW: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Draws the unknown token of each slot and codebook in the slot's next column, and counts the column.

    There is one program per slot and codebook. The argmax of p / e, where e is exponentially distributed, is
    a draw from p, as in `sampling.draw_counted`.

    Args:
        ordered, tokens, most_likely, column: as `order` and `soften` leave them.
        temperature, top_k, top_p, seed: [slots].
        filled: [slots] is increased if the column is below `end`; else nothing is stored.
        end: [slots].
        columns: [slots, codebooks, last_column + 1] tokens.
        ROW: a power of two, at least CARD.
    """
    slot, codebook = tl.program_id(0), tl.program_id(1)
    cell = slot * tl.num_programs(1) + codebook
    rank = tl.arange(0, ROW)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    probability = tl.load(ordered + cell * CARD + rank, mask=rank < CARD, other=0.0)
    own_column = tl.load(column + slot)
    p, k = tl.load(top_p + slot), tl.load(top_k + slot)
    if p > 0:
        allowed = tl.cumsum(probability, axis=0) - probability <= p
    else:
        last = tl.minimum(tl.maximum(k, 1), CARD) - 1
        least = tl.sum(tl.where((rank == last) & (k > 0), probability, 0.0), axis=0)
        allowed = probability >= least  # all tokens if k is 0

    key = tl.load(seed + slot)
    word = mix32(key.to(tl.uint32))
    word = mix32(word ^ (key >> 32).to(tl.uint32))
    word = mix32(word ^ own_column.to(tl.uint32))
    words = mix32(word ^ mix32((codebook * CARD + rank).to(tl.uint32)))
    uniform = ((words >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2 ** -23
    race = tl.where(allowed & (rank < CARD), probability / -tl.log(uniform), -1.0)
    winner = tl.minimum(tl.argmax(race, axis=0), CARD - 1)

    drawn = tl.load(tokens + cell * CARD + winner)
    greedy = tl.load(temperature + slot) < GREEDY_BELOW
    drawn = tl.where(greedy, tl.load(most_likely + cell), drawn).to(tl.int64)
    running = own_column < tl.load(end + slot)
    target = columns + cell * (last_column + 1) + own_column
    given = tl.load(target, mask=running, other=0)
    tl.store(target, drawn, mask=running & (given == UNKNOWN))
    tl.store(filled + slot, own_column + 1, mask=running & (codebook == 0))


@triton.jit
def mix32(word):
    """Applies `sampling._mix32` in 32 bits, where products wrap around."""
    word = word ^ (word >> 16)
    word = word * 0x7FEB352D
    word = word ^ (word >> 15)
    word = word * 0x846CA68B
    return word ^ (word >> 16)
