"""Draws tokens from logits, with classifier-free guidance, temperature and top-k, top-p or greedy choice.

All functions are pure. They do the same arithmetic in the same order and dtypes as audiocraft's `LMModel`, so
that in fp32 on a CPU a generator draws the tokens that audiocraft draws from the global generator.

`draw` draws for one request from its `torch.Generator`. `draw_counted` draws for many requests on the device:
nothing in it waits for the host, and each request has its own parameters.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from musicgen_svc.engine.sampling_params import GREEDY_BELOW, SamplingParams


class SlotParameters(NamedTuple):
    """How each slot's next column is drawn. Each field is a [slots] tensor on the device of the logits.

    The first four have the meanings of `SamplingParams`.
    """

    guidance: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    seed: Tensor
    step: Tensor
    """The index of the column that is drawn."""


def mix(conditional: Tensor, unconditional: Tensor, guidance: float | Tensor) -> Tensor:
    """Applies classifier-free guidance (Ho and Salimans, "Classifier-Free Diffusion Guidance", 2022).

    Args:
        conditional, unconditional: [..., card] logits.
        guidance: 0 gives the unconditional logits, 1 the conditional ones.

    Returns:
        Tensor: [..., card] in the logits' dtype, in which all of it is computed.
    """
    return unconditional + ((conditional - unconditional) * guidance).to(conditional.dtype)


def draw(logits: Tensor, params: SamplingParams, generator: torch.Generator) -> Tensor:
    """Draws a column for one request.

    Args:
        logits: [K, card], after guidance.
        params: how tokens are drawn.
        generator: the source of the random numbers. A greedy choice does not use it.

    Returns:
        Tensor: [K] tokens.
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
    """Keeps the k most likely tokens, and normalizes their probabilities.

    Tokens as likely as the last one of them are kept too. If k is larger than the codebook, all are kept.

    Args:
        probabilities: [..., card].
        k: how many tokens to keep, at least 1.

    Returns:
        Tensor: [..., card], zero for the other tokens.
    """
    threshold = probabilities.topk(min(k, probabilities.shape[-1]), dim=-1).values[..., -1:]
    kept = probabilities * (probabilities >= threshold)
    return kept / kept.sum(dim=-1, keepdim=True)


def keep_top_p(descending: Tensor, p: float) -> Tensor:
    """Keeps the most likely tokens whose probabilities add up to p, and normalizes their probabilities.

    The token with which the sum exceeds p is kept (Holtzman et al., "The Curious Case of Neural Text
    Degeneration", 2020).

    Args:
        descending: [..., card] probabilities in descending order.
        p: the sum.

    Returns:
        Tensor: [..., card], zero for the other tokens.
    """
    before = descending.cumsum(dim=-1) - descending
    kept = descending * ~(before > p)
    return kept / kept.sum(dim=-1, keepdim=True)


def draw_counted(logits: Tensor, parameters: SlotParameters) -> Tensor:
    """Draws a column for many requests at once.

    The random numbers depend on (seed, step, codebook, rank) only, see `counted_uniform`. They do not depend
    on the slot, on other requests or on the state of a generator. Tokens come from the same sets as those of
    `draw`, but only greedy ones are the same tokens.

    Args:
        logits: [B, K, card], after guidance.
        parameters: how each request's tokens are drawn; its guidance is not used.

    Returns:
        Tensor: [B, K] tokens.
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

    # The argmax of p / e, where e is exponentially distributed, is a draw from p (an "exponential race").
    # torch.multinomial would wait for the device.
    uniform = counted_uniform(seed, step, codebooks, card)
    race = torch.where(allowed, probabilities / -torch.log(uniform), -1.0)
    drawn = order.gather(-1, race.argmax(dim=-1, keepdim=True))[..., 0]
    return torch.where(greedy[:, None], logits.argmax(dim=-1), drawn)


def counted_uniform(seed: Tensor, step: Tensor, codebooks: int, card: int) -> Tensor:
    """Computes uniform numbers in (0, 1) that depend on seed, step and index only.

    The seed, the step and the index of the cell are hashed one after the other with the 32-bit mixer
    `lowbias32` (C. Wellons, "Prospecting for Hash Functions", 2018). The arithmetic is in int64, because
    torch has no unsigned multiplication.

    Args:
        seed, step: [B].
        codebooks, card: the shape of a request's numbers.

    Returns:
        Tensor: [B, codebooks, card] in fp32.
    """
    cell = torch.arange(codebooks * card, device=seed.device).view(1, codebooks, card)
    word = _mix32(seed & _MASK32)
    word = _mix32(word ^ ((seed >> 32) & _MASK32))
    word = _mix32(word ^ (step & _MASK32))
    word = _mix32(word[:, None, None] ^ _mix32(cell))
    return ((word >> 9).to(torch.float32) + 0.5) * 2.0**-23


_MASK32 = 0xFFFFFFFF


def _mix32(word: Tensor) -> Tensor:
    """Applies `lowbias32` to 32-bit words in int64."""
    word = word ^ (word >> 16)
    word = (word * 0x7FEB352D) & _MASK32
    word = word ^ (word >> 15)
    word = (word * 0x846CA68B) & _MASK32
    return word ^ (word >> 16)
