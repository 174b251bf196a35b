"""The state of a static batch on the device, and the step that reads and writes it.

Each slot owns two rows, conditional and null. If the request needs one row only (see `needed_rows`), both
rows hold the same numbers. A step computes the leading slots. A slot among them that is not running is
computed too, but its result is discarded. Draws depend on the request's seed and its column only
(`sampling.draw_counted`), so a request gives the same tokens in any slot.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from musicgen_svc.engine.batch import UNKNOWN
from musicgen_svc.engine.decoder import Decoder
from musicgen_svc.engine.kv_cache import RequestCache
from musicgen_svc.engine.prefill import Prefilled
from musicgen_svc.engine.sampling import SlotParameters
from musicgen_svc.engine.sampling_params import SamplingParams


@dataclass(frozen=True)
class Capacity:
    """The size of the buffers. The defaults hold a 30 s window with a melody and a long text."""

    slots: int
    columns: int = 1504  # of a slot
    positions: int = 2048  # of keys and values, in a row
    text: int = 512  # tokens of a slot's text

    def holds(self, columns: int, positions: int, text: int) -> bool:
        """Whether a request with this many columns, positions and text tokens fits a slot."""
        return self == self.for_request(columns, positions, text)

    def for_request(self, columns: int, positions: int, text: int) -> "Capacity":
        """Returns the smallest capacity that holds both what this one holds and the request."""
        return Capacity(
            self.slots, max(self.columns, columns), max(self.positions, positions), max(self.text, text)
        )


@dataclass(frozen=True)
class ActiveExtent:
    """How much of the buffers a step reads."""

    slots: int  # the leading ones
    positions: int  # of each row
    text: int  # tokens of each slot's text


class StaticAttention:
    """The attention of one step: each row of the leading slots attends to what it has used of the buffers."""

    text_rows = None
    """All rows. A row without a text has the text length 0, which costs less than to leave the row out."""

    def __init__(self, state: "DeviceState", extent: ActiveExtent) -> None:
        """Binds the attention operations to the lengths that are on the device."""
        self._state, self._rows = state, slice(2 * extent.slots)
        last = state.position()[: extent.slots, None].expand(-1, 2).flatten()  # [rows]
        self.positions = last[:, None]
        attention = state.operations.attention
        self._attend = attention(last + 1, extent.positions)
        self._cross_attend = attention(state.text_length[self._rows], extent.text)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Stores the key and value, and computes self-attention, as `Attention.attend` with T = 1."""
        keys, values = self._state.keys[layer, self._rows], self._state.values[layer, self._rows]
        return self._attend(query, keys, values, (key, value))

    def cross_attend(self, layer: int, query: Tensor) -> Tensor:
        """Attends to the text, as `Attention.cross_attend` with T = 1.

        Both rows of a slot share the slot's text, whose length for the null row is 0.
        """
        assert self._state.text_keys is not None and self._state.text_values is not None
        slots = slice(len(query) // 2)
        return self._cross_attend(
            query, self._state.text_keys[layer, slots], self._state.text_values[layer, slots]
        )


class DeviceState:
    """The buffers of `capacity.slots` slots. A slot is stopped until it is opened for a request.

    Attributes:
        operations: the operations of the decoder.
        capacity: the size of the buffers.
        columns: [slots, K, columns + 1] tokens, delayed.
        filled: [slots] columns [0, filled) are final.
        end: [slots] the number of the request's columns; 0 if the slot is stopped.
        prefix_length: [slots] positions of the prefix.
        seed, temperature, top_k, top_p, guidance: [slots] how tokens are drawn.
        keys, values: [layers, rows, heads, positions, head], two rows per slot.
        text_keys, text_values: [layers, slots, heads, text, head]; None if the model has no cross-attention.
        text_length: [rows]; 0 for a row without a text.
    """

    def __init__(self, decoder: Decoder, capacity: Capacity) -> None:
        """Allocates the buffers. All slots are stopped."""
        self._decoder = decoder
        self.operations = decoder.operations
        self.capacity = capacity
        device, slots = decoder.device, capacity.slots
        layers, heads = len(decoder.layers), decoder.heads
        head = decoder.dim // heads

        def per_slot(value: int = 0) -> Tensor:
            return torch.full((slots,), value, device=device)

        def buffer(rows: int, length: int) -> Tensor:
            return torch.zeros(layers, rows, heads, length, head, dtype=decoder.dtype, device=device)

        self._slot_of_row = torch.arange(2 * slots, device=device) // 2
        self.filled, self.end = per_slot(1), per_slot(0)
        self.prefix_length, self.seed = per_slot(0), per_slot(0)
        self.top_k = per_slot(1)
        self.text_length = torch.zeros(2 * slots, dtype=torch.long, device=device)  # [rows]
        self.temperature, self.top_p, self.guidance = (torch.zeros(slots, device=device) for _ in range(3))
        # One column more than a request has: slots that are not running write there.
        self.columns = torch.zeros(
            slots, decoder.codebooks, capacity.columns + 1, dtype=torch.long, device=device
        )
        self.keys, self.values = (buffer(2 * slots, capacity.positions) for _ in range(2))
        self.text_keys = buffer(slots, capacity.text) if decoder.has_text else None
        self.text_values = buffer(slots, capacity.text) if decoder.has_text else None
        decoder.reserve(capacity.positions)

    def open_slot(self, slot: int, prefilled: Prefilled, sampling: SamplingParams, seed: int) -> None:
        """Copies a prefilled request into a slot, and draws its first column.

        Args:
            slot: the index of the slot.
            prefilled: the request after its prefill.
            sampling: how its tokens are drawn.
            seed: the seed of its draws.
        """
        cache, length = prefilled.cache, prefilled.columns.shape[1]
        assert length <= self.capacity.columns, (length, self.capacity)
        assert cache.length + length - prefilled.start <= self.capacity.positions, (
            cache.length,
            self.capacity,
        )
        assert cache.text_length <= self.capacity.text, (cache.text_length, self.capacity)
        own = slice(2 * slot, 2 * slot + 2)  # a single row is copied into both
        self.keys[:, own, :, : cache.length] = cache.keys[:, :, :, : cache.length]
        self.values[:, own, :, : cache.length] = cache.values[:, :, :, : cache.length]
        self._copy_text(slot, cache)
        self.columns[slot, :, :length] = prefilled.columns
        for per_slot, number in (
            (self.filled, prefilled.start), (self.end, length),
            (self.prefix_length, cache.length - prefilled.start),
            (self.temperature, sampling.temperature), (self.guidance, sampling.guidance),
            (self.top_k, sampling.top_k), (self.top_p, sampling.top_p), (self.seed, seed),
        ):  # fmt: skip
            per_slot[slot].fill_(number)  # an assignment would copy from the host, and wait
        self._draw_column(prefilled.logits.expand(2, -1, -1)[None], slice(slot, slot + 1))

    def stop(self, slot: int) -> None:
        """Stops a slot: the following steps do not change it."""
        self.end[slot].fill_(0)

    def stop_all(self) -> None:
        """Stops all slots."""
        self.end.zero_()

    def step(self, extent: ActiveExtent) -> None:
        """Computes one more column for every running slot among the leading ones.

        Args:
            extent: how much of the buffers is read. It must include every running slot's columns.
        """
        slots = slice(extent.slots)
        last = self.columns[slots].gather(2, self._column_index(self.filled[slots] - 1))  # [slots, K, 1]
        rows = self._slot_of_row[: 2 * extent.slots]
        logits = self._decoder.logits(last, rows, StaticAttention(self, extent))
        self._draw_column(logits.view(-1, 2, *logits.shape[1:]), slots)

    def with_all_slots_stopped(self, call: Callable[[], None]) -> None:
        """Makes a call while all slots are stopped, and starts them again.

        A step in the call writes only scratch, which the next step overwrites.
        """
        end = self.end.clone()
        self.end.zero_()
        try:
            call()
        finally:
            self.end.copy_(end)

    def position(self) -> Tensor:
        """Returns the position of each slot's newest token [slots], counted from the start of its prefix."""
        return (self.prefix_length + self.filled - 1).clamp(max=self.capacity.positions - 1)

    def _draw_column(self, logits: Tensor, slots: slice) -> None:
        """Draws the unknown tokens of the next column of some slots from logits [slots, 2, K, card]."""
        drawn = self.operations.draw(
            logits,
            SlotParameters(
                self.guidance[slots], self.temperature[slots], self.top_k[slots], self.top_p[slots],
                self.seed[slots], self.filled[slots],
            ),
        )  # fmt: skip
        running = self.filled[slots] < self.end[slots]
        index = self._column_index(torch.where(running, self.filled[slots], self.capacity.columns))
        own = self.columns[slots]
        given = own.gather(2, index)
        own.scatter_(2, index, torch.where(given == UNKNOWN, drawn[..., None], given))
        self.filled[slots].add_(running)

    def _column_index(self, column: Tensor) -> Tensor:
        """Expands one column number per slot [slots] to an index [slots, K, 1] into the columns."""
        return column[:, None, None].expand(-1, self._decoder.codebooks, 1)

    def _copy_text(self, slot: int, cache: RequestCache) -> None:
        """Copies the keys and values of the text, which only the conditional row has, and its length."""
        if self.text_keys is None or self.text_values is None:
            return
        self.text_length[2 * slot].fill_(cache.text_length)
        if cache.text is not None:
            assert (cache.rows, cache.text_rows) == (2, (0,)), "the null row has a text of its own"
            keys, values = cache.text
            self.text_keys[:, slot, :, : cache.text_length] = keys[:, 0]
            self.text_values[:, slot, :, : cache.text_length] = values[:, 0]
