"""The cache of keys and values, in buffers of a fixed size, and attention over it.

`RequestCache` holds the keys and values of one request. `RaggedAttention` computes the attention of several
requests whose rows are concatenated in one batch: each row attends to the used part of its own request's
cache. The attention of a static batch, whose lengths are on the device, is in `state.py`.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Attention(Protocol):
    """The attention of one forward pass: stores new keys and values, and attends to all of them."""

    @property
    def positions(self) -> Tensor:
        """[rows, T] or [1, T]: the position of each new token in its sequence."""

    @property
    def text_rows(self) -> Tensor | None:
        """The indices of the rows that have a text. None means all rows."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Stores the key and value of the new tokens, and computes causal self-attention.

        Args:
            layer: the index of the layer.
            query, key, value: [rows, heads, T, head] of the new tokens.

        Returns:
            Tensor: [rows, heads, T, head].
        """

    def cross_attend(self, layer: int, query: Tensor) -> Tensor:
        """Attends to the text: [rows with a text, heads, T, head] -> the same shape."""


class RequestCache:
    """The keys and values of one request.

    Attributes:
        keys, values: [layers, rows, heads, capacity, head], of which the first `length` positions are used.
        rows: the request's rows: 2 (conditional and null) or 1.
        text: keys and values of the text, each [layers, rows with a text, heads, S, head], or None.
        text_rows: the indices of the rows that have a text.
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
        """Makes an empty cache. `head` is the width of an attention head, `capacity` is in positions."""
        shape = (layers, rows, heads, capacity, head)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0
        self.rows = rows
        self.text = text
        self.text_rows = tuple(text_rows)

    @property
    def capacity(self) -> int:
        """How many positions fit."""
        return self.keys.shape[3]

    @property
    def text_length(self) -> int:
        """S, the length of the text; 0 without a text."""
        return 0 if self.text is None else self.text[0].shape[3]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Stores the key and value, and computes causal self-attention, as `Attention.attend`.

        T > 1 is allowed only in a prefill, when the cache is empty. `length` does not change here but after
        the whole forward pass, so that a step that failed can be repeated.
        """
        new = key.shape[2]
        end = self.length + new
        assert end <= self.capacity, (end, self.capacity)
        assert new == 1 or self.length == 0, "prefill is one pass"
        self.keys[layer, :, :, self.length : end] = key
        self.values[layer, :, :, self.length : end] = value
        used = self.keys[layer, :, :, :end], self.values[layer, :, :, :end]
        return F.scaled_dot_product_attention(query, *used, is_causal=new > 1)

    def cross_attend(self, layer: int, query: Tensor) -> Tensor:
        """Attends to the text, as `Attention.cross_attend`."""
        assert self.text is not None
        keys, values = self.text
        return F.scaled_dot_product_attention(query, keys[layer], values[layer])


class RaggedAttention:
    """The attention of requests whose rows are concatenated, each with its own cache and length."""

    def __init__(self, caches: Sequence[RequestCache], new: int) -> None:
        """Computes the positions and text rows of a forward pass.

        Args:
            caches: one for each request.
            new: T, the number of new tokens of each request. It must be 1 if there are several requests.
        """
        assert len(caches) == 1 or new == 1
        self._caches = caches
        self._new = new
        device = caches[0].keys.device
        starts = [c.length for c in caches for _ in range(c.rows)]
        self.positions = torch.tensor(starts, device=device)[:, None] + torch.arange(new, device=device)

        first_rows = [sum(c.rows for c in caches[:i]) for i in range(len(caches))]
        with_text = [first + row for first, c in zip(first_rows, caches, strict=True) for row in c.text_rows]
        all_rows = len(with_text) == sum(c.rows for c in caches)
        self.text_rows = None if all_rows else torch.tensor(with_text, dtype=torch.long, device=device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Computes self-attention request by request, as `Attention.attend`."""
        if len(self._caches) == 1:
            return self._caches[0].attend(layer, query, key, value)
        sizes = [cache.rows for cache in self._caches]
        parts = zip(self._caches, *(torch.split(x, sizes) for x in (query, key, value)), strict=True)
        return torch.cat([cache.attend(layer, q, k, v) for cache, q, k, v in parts])

    def cross_attend(self, layer: int, query: Tensor) -> Tensor:
        """Attends to the texts request by request, as `Attention.cross_attend`."""
        caches = [cache for cache in self._caches if cache.text_rows]
        if len(caches) == 1:
            return caches[0].cross_attend(layer, query)
        parts = zip(caches, torch.split(query, [len(cache.text_rows) for cache in caches]), strict=True)
        return torch.cat([cache.cross_attend(layer, q) for cache, q in parts])

    def advance(self) -> None:
        """Counts the stored positions as used. Must be called when the forward pass is done."""
        for cache in self._caches:
            cache.length += self._new
