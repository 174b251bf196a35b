"""Keys and values that were computed before, in buffers that never grow, and attention over them.

`RequestCache` holds one request's. `RaggedAttention` lets several requests of different lengths, whose
rows lie one after the other in the batch, attend each to its own, over the used length only.

The static counterpart, whose lengths live on the device, is in `state.py`.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Attention(Protocol):
    """What a decoder's forward asks: stores keys and values as they come, answers queries."""

    @property
    def positions(self) -> Tensor:
        """[rows, T] or [1, T]: where in its sequence each of the new tokens stands."""

    @property
    def cross_rows(self) -> Tensor | None:
        """The rows that have a text to attend to, as indices; None: all of them."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Three [rows, heads, T, head] of new tokens -> the same shape; stores key and value."""

    def cross(self, layer: int, query: Tensor) -> Tensor:
        """[cross rows, heads, T, head] -> the same shape, over the text's keys and values."""


class RequestCache:
    """One request's buffers, sized for what was asked.

    keys, values: [layers, rows, heads, capacity, head], the first `length` positions used
    text: keys and values of the text, each [layers, text rows, heads, S, head]; None: no text
    """

    def __init__(
        self,
        *,
        layers: int,
        rows: int,
        heads: int,
        capacity: int,
        head: int,
        text: tuple[Tensor, Tensor] | None,
        text_rows: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (layers, rows, heads, capacity, head)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0
        self.rows = rows
        self.text = text
        self.text_rows = tuple(text_rows)

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    @property
    def text_length(self) -> int:
        return 0 if self.text is None else self.text[0].shape[3]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[rows, heads, T, head] each; T > 1 only from an empty cache (prefill), where it is causal.

        `length` stands until the whole forward is done: a step that failed can be repeated.
        """
        new = key.shape[2]
        end = self.length + new
        assert end <= self.capacity, (end, self.capacity)
        assert new == 1 or self.length == 0, "prefill is one pass"
        self.keys[layer, :, :, self.length : end] = key
        self.values[layer, :, :, self.length : end] = value
        used = self.keys[layer, :, :, :end], self.values[layer, :, :, :end]
        return F.scaled_dot_product_attention(query, *used, is_causal=new > 1)

    def cross(self, layer: int, query: Tensor) -> Tensor:
        assert self.text is not None
        keys, values = self.text
        return F.scaled_dot_product_attention(query, keys[layer], values[layer])


class RaggedAttention:
    """Requests side by side in one batch, each with its own cache and length."""

    def __init__(self, caches: Sequence[RequestCache], new: int) -> None:
        """`new`: how many tokens each of them brings; more than one only for a request by itself."""
        assert len(caches) == 1 or new == 1
        self._caches = caches
        self._new = new
        device = caches[0].keys.device
        starts = [c.length for c in caches for _ in range(c.rows)]
        self.positions = torch.tensor(starts, device=device)[:, None] + torch.arange(new, device=device)

        first_rows = [sum(c.rows for c in caches[:i]) for i in range(len(caches))]
        with_text = [first + row for first, c in zip(first_rows, caches, strict=True) for row in c.text_rows]
        everyone = len(with_text) == sum(c.rows for c in caches)
        self.cross_rows = None if everyone else torch.tensor(with_text, dtype=torch.long, device=device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if len(self._caches) == 1:
            return self._caches[0].attend(layer, query, key, value)
        sizes = [cache.rows for cache in self._caches]
        parts = zip(self._caches, *(torch.split(x, sizes) for x in (query, key, value)), strict=True)
        return torch.cat([cache.attend(layer, q, k, v) for cache, q, k, v in parts])

    def cross(self, layer: int, query: Tensor) -> Tensor:
        caches = [cache for cache in self._caches if cache.text_rows]
        if len(caches) == 1:
            return caches[0].cross(layer, query)
        parts = zip(caches, torch.split(query, [len(cache.text_rows) for cache in caches]), strict=True)
        return torch.cat([cache.cross(layer, q) for cache, q in parts])

    def advance(self) -> None:
        """The forward is done: what it stored counts from now on."""
        for cache in self._caches:
            cache.length += self._new
