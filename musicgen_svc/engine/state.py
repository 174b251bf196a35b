"""The state of a static batch on the device, and the step that reads and writes it.

Each slot owns two rows, its CFG pair. Where one row would do (see `rows_that_matter`) both hold the same.
A step computes the leading slots. A slot among them that is not running is computed too, and keeps nothing.
Draws are keyed by the request's seed and its column (`sampling.draw_counted`), so a request gives the same
tokens in any slot.
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
    """The size of the buffers. A 30 s window with melody and a long text fits the defaults."""

    slots: int
    columns: int = 1504
    positions: int = 2048
    text: int = 512

    def holds(self, columns: int, positions: int, text: int) -> bool:
        return self == self.for_request(columns, positions, text)

    def for_request(self, columns: int, positions: int, text: int) -> "Capacity":
        """The smallest capacity that also holds a request. It is this one, if that holds it."""
        return Capacity(
            self.slots, max(self.columns, columns), max(self.positions, positions), max(self.text, text)
        )


@dataclass(frozen=True)
class ActiveExtent:
    """How much of the buffers a step reads."""

    slots: int
    positions: int
    text: int


class StaticAttention:
    """Attention over what each row of the leading slots has used of the buffers."""

    cross_rows = None
    """A row without a text attends to nothing, which costs less than to leave the row out."""

    def __init__(self, state: "DeviceState", extent: ActiveExtent) -> None:
        self._state, self._rows = state, slice(2 * extent.slots)
        last = state.position()[: extent.slots, None].expand(-1, 2).flatten()  # [rows]
        self.positions = last[:, None]
        attention = state.operations.attention
        self._attend = attention(last + 1, extent.positions)
        self._cross_attend = attention(state.text_length[self._rows], extent.text)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[rows, heads, 1, head] each."""
        keys, values = self._state.keys[layer, self._rows], self._state.values[layer, self._rows]
        return self._attend(query, keys, values, (key, value))

    def cross(self, layer: int, query: Tensor) -> Tensor:
        """[rows, heads, 1, head] -> the same: both rows of a slot have its one text; the null row has
        length 0."""
        assert self._state.text_keys is not None and self._state.text_values is not None
        slots = slice(len(query) // 2)
        return self._cross_attend(
            query, self._state.text_keys[layer, slots], self._state.text_values[layer, slots]
        )


class DeviceState:
    """The buffers of `capacity.slots` slots. A slot is stopped until a request moves in."""

    def __init__(self, decoder: Decoder, capacity: Capacity) -> None:
        self._decoder = decoder
        self.operations = decoder.operations
        self.capacity = capacity
        device, slots = decoder.device, capacity.slots
        layers, heads = len(decoder.layers), decoder.heads
        head = decoder.dim // heads

        def whole(value: int = 0) -> Tensor:
            return torch.full((slots,), value, device=device)

        def buffer(rows: int, length: int) -> Tensor:
            return torch.zeros(layers, rows, heads, length, head, dtype=decoder.dtype, device=device)

        self._slot_of_row = torch.arange(2 * slots, device=device) // 2
        self.filled, self.end, self.before, self.seed = whole(1), whole(0), whole(0), whole(0)
        self.top_k = whole(1)
        self.text_length = torch.zeros(2 * slots, dtype=torch.long, device=device)  # [rows]
        self.temperature, self.top_p, self.guidance = (torch.zeros(slots, device=device) for _ in range(3))
        # One column more than a request has: where slots that are not running write.
        self.columns = torch.zeros(
            slots, decoder.codebooks, capacity.columns + 1, dtype=torch.long, device=device
        )
        self.keys, self.values = (buffer(2 * slots, capacity.positions) for _ in range(2))
        self.text_keys = buffer(slots, capacity.text) if decoder.has_text else None
        self.text_values = buffer(slots, capacity.text) if decoder.has_text else None
        decoder.reserve(capacity.positions)

    def move_in(self, slot: int, begun: Prefilled, sampling: SamplingParams, seed: int) -> None:
        """Copies a prefilled request into a slot, and draws the column after its prefill."""
        cache, length = begun.cache, begun.columns.shape[1]
        assert length <= self.capacity.columns, (length, self.capacity)
        assert cache.length + length - begun.start <= self.capacity.positions, (cache.length, self.capacity)
        assert cache.text_length <= self.capacity.text, (cache.text_length, self.capacity)
        own = slice(2 * slot, 2 * slot + 2)  # a single row is copied into both
        self.keys[:, own, :, : cache.length] = cache.keys[:, :, :, : cache.length]
        self.values[:, own, :, : cache.length] = cache.values[:, :, :, : cache.length]
        self._copy_text(slot, cache)
        self.columns[slot, :, :length] = begun.columns
        for numbers, own_number in (
            (self.filled, begun.start), (self.end, length), (self.before, cache.length - begun.start),
            (self.temperature, sampling.temperature), (self.guidance, sampling.guidance),
            (self.top_k, sampling.top_k), (self.top_p, sampling.top_p), (self.seed, seed),
        ):  # fmt: skip
            numbers[slot].fill_(own_number)  # assigned, it would be copied from the host, and awaited
        self._take(begun.logits.expand(2, -1, -1)[None], slice(slot, slot + 1))

    def stop(self, slot: int) -> None:
        self.end[slot].fill_(0)

    def stop_all(self) -> None:
        self.end.zero_()

    def step(self, extent: ActiveExtent) -> None:
        """Computes one more column for every slot among the leading ones that is not done."""
        slots = slice(extent.slots)
        last = self.columns[slots].gather(2, self._at(self.filled[slots] - 1))  # [slots, K, 1]
        rows = self._slot_of_row[: 2 * extent.slots]
        logits = self._decoder.logits(last, rows, StaticAttention(self, extent))
        self._take(logits.view(-1, 2, *logits.shape[1:]), slots)

    def with_all_slots_stopped(self, call: Callable[[], None]) -> None:
        """Makes a call with all slots stopped: a step then writes only scratch that the next step
        overwrites."""
        end = self.end.clone()
        self.end.zero_()
        try:
            call()
        finally:
            self.end.copy_(end)

    def position(self) -> Tensor:
        """[slots]: the position of each slot's newest token, its prefix counted."""
        return (self.before + self.filled - 1).clamp(max=self.capacity.positions - 1)

    def _take(self, logits: Tensor, slots: slice) -> None:
        """Draws the tokens of the next column from its logits [slots, 2, K, card], where they are not
        given."""
        drawn = self.operations.draw(
            logits,
            SlotParameters(
                self.guidance[slots], self.temperature[slots], self.top_k[slots], self.top_p[slots],
                self.seed[slots], self.filled[slots],
            ),
        )  # fmt: skip
        running = self.filled[slots] < self.end[slots]
        at = self._at(torch.where(running, self.filled[slots], self.capacity.columns))
        own = self.columns[slots]
        given = own.gather(2, at)
        own.scatter_(2, at, torch.where(given == UNKNOWN, drawn[..., None], given))
        self.filled[slots].add_(running)

    def _at(self, column: Tensor) -> Tensor:
        """An index [slots, K, 1] into the columns, from a column [slots] for each slot."""
        return column[:, None, None].expand(-1, self._decoder.codebooks, 1)

    def _copy_text(self, slot: int, cache: RequestCache) -> None:
        """Copies the text of a request, if it has one. Only the conditional row has it."""
        if self.text_keys is None or self.text_values is None:
            return
        self.text_length[2 * slot].fill_(cache.text_length)
        if cache.text is not None:
            assert (cache.rows, cache.text_rows) == (2, (0,)), "the null row has a text of its own"
            keys, values = cache.text
            self.text_keys[:, slot, :, : cache.text_length] = keys[:, 0]
            self.text_values[:, slot, :, : cache.text_length] = values[:, 0]
