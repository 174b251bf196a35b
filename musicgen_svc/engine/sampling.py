"""Logits -> tokens: classifier-free guidance, temperature, top-k, top-p, greedy.

Pure, and the same arithmetic in the same order and dtypes as audiocraft's `LMModel`, so that in
fp32 on a CPU a generator draws the tokens that audiocraft draws from the global one.

`draw` is for one request and its `torch.Generator`. `draw_counted` is for many at once on the
device: nothing in it waits for the host, and each request has its own parameters.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from musicgen_svc.engine.sampling_params import GREEDY_BELOW, SamplingParams


class SlotParameters(NamedTuple):
    """How each slot's next column is drawn: [slots] tensors on the device of the logits."""

    guidance: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    seed: Tensor
    step: Tensor
    """The column that is drawn."""


def mix(conditional: Tensor, unconditional: Tensor, guidance: float | Tensor) -> Tensor:
    """Applies classifier-free guidance, in the logits' dtype throughout: [..., card] twice -> [..., card]."""
    return unconditional + ((conditional - unconditional) * guidance).to(conditional.dtype)


def draw(logits: Tensor, params: SamplingParams, generator: torch.Generator) -> Tensor:
    """Draws a column for one request: [K, card] logits -> [K] tokens.

    A greedy choice leaves the generator as it is.
    """
    if params.temperature < GREEDY_BELOW:
        return logits.argmax(dim=-1)
    probabilities = torch.softmax(logits / params.temperature, dim=-1, dtype=torch.float32)
    if params.top_p > 0:
        probabilities, order = probabilities.sort(dim=-1, descending=True)
        probabilities = keep_top_p(probabilities, params.top_p)
        choice = torch.multinomial(probabilities, 1, generator=generator)
        return order.gather(-1, choice)[:, 0]
    if params.top_k > 0:
        probabilities = keep_top_k(probabilities, params.top_k)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def keep_top_k(probabilities: Tensor, k: int) -> Tensor:
    """[..., card] -> the same, renormalised over the k most likely; ties with the last of them stay.

    k beyond the codebook keeps all of it.
    """
    threshold = probabilities.topk(min(k, probabilities.shape[-1]), dim=-1).values[..., -1:]
    kept = probabilities * (probabilities >= threshold)
    return kept / kept.sum(dim=-1, keepdim=True)


def keep_top_p(descending: Tensor, p: float) -> Tensor:
    """[..., card] in descending order -> the same, renormalised over the first that hold p together."""
    before = descending.cumsum(dim=-1) - descending
    kept = descending * ~(before > p)
    return kept / kept.sum(dim=-1, keepdim=True)


def draw_counted(logits: Tensor, parameters: SlotParameters) -> Tensor:
    """Draws a column for many requests at once: [B, K, card] guided logits -> [B, K] tokens.

    The draw is keyed by (seed, step, codebook, rank), see `counted_uniform`: it does not depend on
    the slot, on the other requests or on any generator's state. The sets that may be drawn from are
    those of `draw`; the tokens are not, but for greedy ones.
    """
    _, temperature, top_k, top_p, seed, step = parameters
    batch, codebooks, card = logits.shape
    column = (slice(None), None, None)
    greedy = temperature < GREEDY_BELOW
    safe = torch.where(greedy, 1.0, temperature)[column]
    probabilities = torch.softmax((logits / safe).to(logits.dtype), dim=-1, dtype=torch.float32)
    probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)

    last = (top_k.clamp(1, card) - 1)[column].expand(batch, codebooks, 1)
    in_top_k = (probabilities >= probabilities.gather(-1, last)) | (top_k <= 0)[column]
    before = probabilities.cumsum(dim=-1) - probabilities
    in_top_p = ~(before > top_p[column])
    allowed = torch.where((top_p > 0)[column], in_top_p, in_top_k)

    # argmax(p / e) with e exponential is a draw from p, without the sync inside torch.multinomial.
    uniform = counted_uniform(seed, step, codebooks, card)
    race = torch.where(allowed, probabilities / -torch.log(uniform), -1.0)
    drawn = order.gather(-1, race.argmax(dim=-1, keepdim=True))[..., 0]
    return torch.where(greedy[:, None], logits.argmax(dim=-1), drawn)


def counted_uniform(seed: Tensor, step: Tensor, codebooks: int, card: int) -> Tensor:
    """[B] seeds and [B] steps -> [B, codebooks, card] numbers in (0, 1), a function of nothing else.

    Three rounds of the 32-bit mixer `lowbias32` (C. Wellons, "Prospecting for Hash Functions", 2018),
    in int64 because torch has no unsigned multiplication: seed, then step, then the cell's index.
    """
    cell = torch.arange(codebooks * card, device=seed.device).view(1, codebooks, card)
    word = _mix32(seed & _MASK32)
    word = _mix32(word ^ ((seed >> 32) & _MASK32))
    word = _mix32(word ^ (step & _MASK32))
    word = _mix32(word[:, None, None] ^ _mix32(cell))
    return ((word >> 9).to(torch.float32) + 0.5) * 2.0**-23


_MASK32 = 0xFFFFFFFF


def _mix32(word: Tensor) -> Tensor:
    word = word ^ (word >> 16)
    word = (word * 0x7FEB352D) & _MASK32
    word = word ^ (word >> 15)
    word = (word * 0x846CA68B) & _MASK32
    return word ^ (word >> 16)
