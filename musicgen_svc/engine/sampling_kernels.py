# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""The draws of `operations.draw` as three Triton kernels, where PyTorch launches about eighty.

They give the tokens of `sampling.draw_counted`, up to the last bit of a probability, and sort nothing.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from musicgen_svc.engine.sampling import SlotParameters
from musicgen_svc.engine.sampling_params import GREEDY_BELOW

TOKENS, OTHERS = 64, 128
"""How many tokens one program ranks, and how many it compares them with at once."""

PER_SLOT = SlotParameters._fields
"""Per-slot scalars.

They are not specialized on alignment, or Triton would compile a kernel per slot offset.
"""


def draw(logits: Tensor, parameters: SlotParameters) -> Tensor:
    """`Operations.draw`."""
    guidance, temperature, top_k, top_p, seed, step = parameters
    slots, _, codebooks, card = logits.shape
    probabilities = torch.empty(slots, codebooks, card, device=logits.device)
    races = torch.empty_like(probabilities)
    tokens = torch.empty(slots, codebooks, dtype=torch.long, device=logits.device)
    for per_slot in parameters:
        assert per_slot.shape == (slots,) and per_slot.is_contiguous(), (per_slot.shape, slots)
    row = triton.next_power_of_2(card)
    with launching_on(logits.device):
        _soften[(slots, codebooks)](
            logits.contiguous(), guidance, temperature, probabilities, tokens,
            GREEDY_BELOW=GREEDY_BELOW, CARD=card, ROW=row, num_warps=8,
        )  # fmt: skip
        _race[(slots, codebooks, triton.cdiv(card, TOKENS))](
            probabilities, top_k, top_p, seed, step, races, CARD=card, TOKENS=TOKENS, OTHERS=OTHERS
        )
        _finish[(slots, codebooks)](
            races, temperature, tokens, GREEDY_BELOW=GREEDY_BELOW, CARD=card, ROW=row, num_warps=8
        )
    return tokens


@triton.jit(do_not_specialize_on_alignment=PER_SLOT)
def _soften(
    logits, guidance, temperature, probabilities, tokens,
    GREEDY_BELOW: tl.constexpr, CARD: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """`sampling.mix` and a softmax, rounded as there. One program per slot and codebook.

    `tokens` are the likeliest ones for now.
    """
    slot, codebook = tl.program_id(0), tl.program_id(1)
    codebooks = tl.num_programs(1)
    dtype = logits.dtype.element_ty
    token = tl.arange(0, ROW)
    known = token < CARD
    row = logits + (slot * 2 * codebooks + codebook) * CARD + token
    conditional = tl.load(row, mask=known, other=0.0).to(tl.float32)
    null = tl.load(row + codebooks * CARD, mask=known, other=0.0).to(tl.float32)
    apart = (conditional - null).to(dtype).to(tl.float32)
    pull = (apart * tl.load(guidance + slot)).to(dtype).to(tl.float32)
    mixed = tl.where(known, (null + pull).to(dtype).to(tl.float32), -float("inf"))
    cell = slot * codebooks + codebook
    likeliest = tl.minimum(tl.argmax(mixed, axis=0), CARD - 1)
    tl.store(tokens + cell, likeliest.to(tl.int64))

    heat = tl.load(temperature + slot)
    heat = tl.where(heat < GREEDY_BELOW, 1.0, heat)
    scaled = tl.div_rn(mixed, heat).to(dtype).to(tl.float32)
    weight = tl.exp(scaled - tl.max(scaled, axis=0))
    tl.store(probabilities + cell * CARD + token, weight / tl.sum(weight, axis=0), mask=known)


@triton.jit(do_not_specialize_on_alignment=PER_SLOT)
def _race(
    probabilities, top_k, top_p, seed, step, races,
    CARD: tl.constexpr, TOKENS: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    """What `sampling.draw_counted` takes the argmax of, of some tokens of a slot's codebook.

    A token's place in the order is the number of those before it, its nucleus their mass: both are
    counted, and nothing is sorted. Among equals the first token leads; all of them, or none, are
    among the top k.
    """
    slot, codebook = tl.program_id(0), tl.program_id(1)
    row = (slot * tl.num_programs(1) + codebook) * CARD
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    own = tl.load(probabilities + row + token, mask=token < CARD, other=0.0)
    greater = tl.zeros([TOKENS], dtype=tl.int32)
    rank = tl.zeros([TOKENS], dtype=tl.int32)
    before = tl.zeros([TOKENS], dtype=tl.float32)
    for start in range(0, CARD, OTHERS):
        other = start + tl.arange(0, OTHERS)
        theirs = tl.load(probabilities + row + other, mask=other < CARD, other=-1.0)
        above = theirs[None, :] > own[:, None]
        ahead = above | ((theirs[None, :] == own[:, None]) & (other[None, :] < token[:, None]))
        greater += tl.sum(above.to(tl.int32), axis=1)
        rank += tl.sum(ahead.to(tl.int32), axis=1)
        before += tl.sum(tl.where(ahead, theirs[None, :], 0.0), axis=1)

    most = tl.load(top_k + slot).to(tl.int32)
    mass = tl.load(top_p + slot)
    in_top_k = (greater < most) | (most <= 0)
    in_top_p = before <= mass
    allowed = tl.where(mass > 0, in_top_p, in_top_k)

    key = tl.load(seed + slot)
    word = _mix32(key.to(tl.uint32))
    word = _mix32(word ^ (key >> 32).to(tl.uint32))
    word = _mix32(word ^ tl.load(step + slot).to(tl.uint32))
    words = _mix32(word ^ _mix32((codebook * CARD + rank).to(tl.uint32)))
    uniform = ((words >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2 ** -23
    race = tl.where(allowed, own / -tl.log(uniform), -1.0)
    tl.store(races + row + token, race, mask=token < CARD)


@triton.jit(do_not_specialize_on_alignment=PER_SLOT)
def _finish(races, temperature, tokens, GREEDY_BELOW: tl.constexpr, CARD: tl.constexpr, ROW: tl.constexpr):
    """Stores the winner, unless the draw is greedy. One program per slot and codebook."""
    slot = tl.program_id(0)
    cell = slot * tl.num_programs(1) + tl.program_id(1)
    token = tl.arange(0, ROW)
    race = tl.load(races + cell * CARD + token, mask=token < CARD, other=-2.0)
    winner = tl.minimum(tl.argmax(race, axis=0), CARD - 1)
    drawn = tl.load(temperature + slot) >= GREEDY_BELOW
    tl.store(tokens + cell, winner.to(tl.int64), mask=drawn)


@triton.jit
def _mix32(word):
    """`sampling._mix32` in 32 bits, which wrap by themselves."""
    word = word ^ (word >> 16)
    word = word * 0x7FEB352D
    word = word ^ (word >> 15)
    word = word * 0x846CA68B
    return word ^ (word >> 16)


def launching_on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the thread's current GPU, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
