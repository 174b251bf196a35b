"""What a decoding step does besides its products, in plain PyTorch; `kernels.py` has the same for GPUs.

An engine takes one set or the other when it is made. These are what the kernels are held to.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from musicgen_svc.engine.sampling import draw_counted, mix


class Attend(Protocol):
    """One query per row over the first positions of a cache, as many as the row has."""

    def __call__(
        self, query: Tensor, keys: Tensor, values: Tensor, new: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """[rows, heads, 1, head] -> the same; a row that has no positions gets zeros.

        keys, values: [caches, heads, capacity, head]; `rows / caches` neighbouring rows share one
        new: key and value [rows, heads, 1, head] of each row's last position, which are stored first;
            then every row has one, and a cache of its own
        """


@dataclass(frozen=True)
class Operations:
    add_norm: Callable[[Tensor, Tensor | None, Tensor, Tensor, float, torch.dtype], tuple[Tensor, Tensor]]
    """(x, delta, weight, bias, eps, dtype) -> (x + delta, its LayerNorm in dtype), see `add_norm`."""
    attention: Callable[[Tensor, int], Attend]
    """(lengths, reach) -> what attends, for all layers of a step, see `attention`."""
    draw: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    """(logits, guidance, temperature, top_k, top_p, seed, step) -> tokens, see `draw`."""
    int8_linear: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(x, weight, scales) -> their product, see `int8_linear`."""
    reads_lengths: bool
    """Whether attention costs what the lengths say, on the device. Otherwise it costs the reach."""


def add_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """[..., D] in fp32, and what is to be added -> the sum, and the sum normalized; computed in fp32."""
    if delta is not None:
        x = x + delta
    return x, F.layer_norm(x, weight.shape, weight, bias, eps).to(dtype)


def attention(lengths: Tensor, reach: int) -> Attend:
    """lengths: [rows]; reach: a bound that the host knows, of the positions that are read."""
    positions = torch.arange(reach, device=lengths.device)
    unseen = positions >= lengths[:, None].clamp(min=1)  # a softmax over nothing would be NaN
    empty = (lengths == 0)[:, None, None, None]
    rows, last = torch.arange(len(lengths), device=lengths.device), lengths - 1

    @cache
    def mask(dtype: torch.dtype) -> Tensor:
        """[rows, reach] to be added to scores: SDPA would make the same of a bool one, in every layer."""
        return torch.zeros(unseen.shape, dtype=dtype, device=unseen.device).masked_fill(unseen, -torch.inf)

    def attend(
        query: Tensor, keys: Tensor, values: Tensor, new: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        caches = len(keys)
        if new is not None:
            keys[rows, :, last], values[rows, :, last] = new[0][:, :, 0], new[1][:, :, 0]
        by_cache = query.view(caches, -1, *query.shape[1:])[:, :, :, 0]  # [caches, sharing, heads, head]
        found = F.scaled_dot_product_attention(
            by_cache.transpose(1, 2),
            keys[:, :, :reach],
            values[:, :, :reach],
            attn_mask=mask(query.dtype).view(caches, 1, -1, reach),
        )
        found = found.transpose(1, 2).flatten(0, 1)[:, :, None]
        return found if new is not None else found.masked_fill(empty, 0)

    return attend


def draw(
    logits: Tensor,
    guidance: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    seed: Tensor,
    step: Tensor,
) -> Tensor:
    """[slots, 2, K, card] logits, the conditional row first; else [slots] each. -> [slots, K] tokens."""
    mixed = mix(logits[:, 0], logits[:, 1], guidance[:, None, None])
    return draw_counted(mixed, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, step=step)


def int8_linear(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """[..., in] by an int8 weight [out, in] with one scale per output, [out] in fp32 -> [..., out].

    Multiplies the weight out first, which is more to write and read than it was in half precision.
    """
    return F.linear(x, (weight * scales[:, None]).to(x.dtype))


PLAIN = Operations(add_norm, attention, draw, int8_linear, reads_lengths=False)
