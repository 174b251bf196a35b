# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""`Operations.draw` as three Triton kernels, where PyTorch launches about eighty.

They draw the tokens of `sampling.draw_counted`, except that probabilities may differ by rounding. They do not
sort.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from musicgen_svc.engine.sampling import SlotParameters
from musicgen_svc.engine.sampling_params import GREEDY_BELOW

TOKENS, OTHERS = 64, 128
"""How many tokens one program ranks, and with how many others it compares them at once."""

PER_SLOT = SlotParameters._fields
"""The kernels' parameters of which each slot has one number.

The kernels are not specialized on their alignment, or Triton would compile one for each offset of a slot.
"""


def draw(logits: Tensor, parameters: SlotParameters) -> Tensor:
    """Draws the next token of every codebook of every slot, as `Operations.draw`."""
    guidance, temperature, top_k, top_p, seed, step = parameters
    slots, _, codebooks, card = logits.shape
    probabilities = torch.empty(slots, codebooks, card, device=logits.device)
    races = torch.empty_like(probabilities)
    tokens = torch.empty(slots, codebooks, dtype=torch.long, device=logits.device)
    for per_slot in parameters:
        assert per_slot.shape == (slots,) and per_slot.is_contiguous(), (per_slot.shape, slots)
    row = triton.next_power_of_2(card)
    with launching_on(logits.device):
        _guided_softmax[(slots, codebooks)](
            logits.contiguous(), guidance, temperature, probabilities, tokens,
            GREEDY_BELOW=GREEDY_BELOW, CARD=card, ROW=row, num_warps=8,
        )  # fmt: skip
        _race[(slots, codebooks, triton.cdiv(card, TOKENS))](
            probabilities, top_k, top_p, seed, step, races, CARD=card, TOKENS=TOKENS, OTHERS=OTHERS
        )
        _choose[(slots, codebooks)](
            races, temperature, tokens, GREEDY_BELOW=GREEDY_BELOW, CARD=card, ROW=row, num_warps=8
        )
    return tokens


@triton.jit(do_not_specialize_on_alignment=PER_SLOT)
def _guided_softmax(
    logits, guidance, temperature, probabilities, tokens,
    GREEDY_BELOW: tl.constexpr, CARD: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """Computes guidance and softmax, with the rounding of `sampling.mix`, and the most likely token.

    There is one program per slot and codebook.
    """
    slot, codebook = tl.program_id(0), tl.program_id(1)
    codebooks = tl.num_programs(1)
    dtype = logits.dtype.element_ty
    token = tl.arange(0, ROW)
    in_range = token < CARD
    row = logits + (slot * 2 * codebooks + codebook) * CARD + token
    conditional = tl.load(row, mask=in_range, other=0.0).to(tl.float32)
    null = tl.load(row + codebooks * CARD, mask=in_range, other=0.0).to(tl.float32)
    difference = (conditional - null).to(dtype).to(tl.float32)
    scaled_difference = (difference * tl.load(guidance + slot)).to(dtype).to(tl.float32)
    mixed = tl.where(in_range, (null + scaled_difference).to(dtype).to(tl.float32), -float("inf"))
    cell = slot * codebooks + codebook
    most_likely = tl.minimum(tl.argmax(mixed, axis=0), CARD - 1)
    tl.store(tokens + cell, most_likely.to(tl.int64))

    divisor = tl.load(temperature + slot)
    divisor = tl.where(divisor < GREEDY_BELOW, 1.0, divisor)
    scaled = tl.div_rn(mixed, divisor).to(dtype).to(tl.float32)
    weight = tl.exp(scaled - tl.max(scaled, axis=0))
    tl.store(probabilities + cell * CARD + token, weight / tl.sum(weight, axis=0), mask=in_range)


@triton.jit(do_not_specialize_on_alignment=PER_SLOT)
def _race(
    probabilities, top_k, top_p, seed, step, races,
    CARD: tl.constexpr, TOKENS: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    """Computes p / e of each token, as `sampling.draw_counted`, or -1 if the token may not be drawn.

    There is one program per slot, codebook and `TOKENS` tokens. Instead of sorting, it counts the tokens that
    come before a token in descending order, and adds up their probabilities for top-p. Of equally likely
    tokens the one with the lower index comes first. For top-k, equally likely tokens are kept together.
    """
    slot, codebook = tl.program_id(0), tl.program_id(1)
    row = (slot * tl.num_programs(1) + codebook) * CARD
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    probability = tl.load(probabilities + row + token, mask=token < CARD, other=0.0)
    greater = tl.zeros([TOKENS], dtype=tl.int32)
    rank = tl.zeros([TOKENS], dtype=tl.int32)
    before = tl.zeros([TOKENS], dtype=tl.float32)
    for start in range(0, CARD, OTHERS):
        other = start + tl.arange(0, OTHERS)
        other_probability = tl.load(probabilities + row + other, mask=other < CARD, other=-1.0)
        more_likely = other_probability[None, :] > probability[:, None]
        ahead = more_likely | (
            (other_probability[None, :] == probability[:, None]) & (other[None, :] < token[:, None])
        )
        greater += tl.sum(more_likely.to(tl.int32), axis=1)
        rank += tl.sum(ahead.to(tl.int32), axis=1)
        before += tl.sum(tl.where(ahead, other_probability[None, :], 0.0), axis=1)

    k = tl.load(top_k + slot).to(tl.int32)
    p = tl.load(top_p + slot)
    in_top_k = (greater < k) | (k <= 0)
    in_top_p = before <= p
    allowed = tl.where(p > 0, in_top_p, in_top_k)

    key = tl.load(seed + slot)
    word = _mix32(key.to(tl.uint32))
    word = _mix32(word ^ (key >> 32).to(tl.uint32))
    word = _mix32(word ^ tl.load(step + slot).to(tl.uint32))
    words = _mix32(word ^ _mix32((codebook * CARD + rank).to(tl.uint32)))
    uniform = ((words >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2 ** -23
    race = tl.where(allowed, probability / -tl.log(uniform), -1.0)
    tl.store(races + row + token, race, mask=token < CARD)


@triton.jit(do_not_specialize_on_alignment=PER_SLOT)
def _choose(races, temperature, tokens, GREEDY_BELOW: tl.constexpr, CARD: tl.constexpr, ROW: tl.constexpr):
    """Stores the token with the highest p / e, unless the choice is greedy.

    There is one program per slot and codebook.
    """
    slot = tl.program_id(0)
    cell = slot * tl.num_programs(1) + tl.program_id(1)
    token = tl.arange(0, ROW)
    race = tl.load(races + cell * CARD + token, mask=token < CARD, other=-2.0)
    winner = tl.minimum(tl.argmax(race, axis=0), CARD - 1)
    drawn = tl.load(temperature + slot) >= GREEDY_BELOW
    tl.store(tokens + cell, winner.to(tl.int64), mask=drawn)


@triton.jit
def _mix32(word):
    """Applies `sampling._mix32` in 32 bits, where products wrap around."""
    word = word ^ (word >> 16)
    word = word * 0x7FEB352D
    word = word ^ (word >> 15)
    word = word * 0x846CA68B
    return word ^ (word >> 16)


def launching_on(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the current one of this thread, on which Triton launches. Does nothing for a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
