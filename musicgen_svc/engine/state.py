"""All that a static batch knows of its slots, on the device, and the step that reads and writes there alone.

Each slot owns two rows, its CFG pair; where one would do (see `rows_that_matter`) both hold the same.
A step computes the leading slots; one among them that is not running computes along and keeps nothing.
Draws are keyed by the request's seed and its column (`sampling.draw_counted`), so a request is the same
in any slot.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from musicgen_svc.engine.batch import UNKNOWN
from musicgen_svc.engine.decoder import Decoder
from musicgen_svc.engine.kv_cache import RequestCache
from musicgen_svc.engine.prefill import Prefilled
from musicgen_svc.request import SamplingParams


@dataclass(frozen=True)
class Capacity:
    """What the buffers are made for; a 30 s window with melody and a long text fits the defaults."""

    slots: int
    columns: int = 1504
    positions: int = 2048
    text: int = 512

    def holds(self, columns: int, positions: int, text: int) -> bool:
        return self == self.for_request(columns, positions, text)

    def for_request(self, columns: int, positions: int, text: int) -> "Capacity":
        """Large enough for a request too: itself, where that is so."""
        return Capacity(
            self.slots, max(self.columns, columns), max(self.positions, positions), max(self.text, text)
        )


@dataclass(frozen=True)
class Reach:
    """How much of the buffers a step reads."""

    slots: int
    positions: int
    text: int


class StaticAttention:
    """Attention over what each row of the leading slots has used of the buffers."""

    cross_rows = None
    """A row without a text hears nothing, which costs less than to leave it out."""

    def __init__(self, state: "State", reach: Reach) -> None:
        self._state, self._rows = state, slice(2 * reach.slots)
        last = state.position()[: reach.slots, None].expand(-1, 2).flatten()  # [rows]
        self.positions = last[:, None]
        attention = state.operations.attention
        self._attend = attention(last + 1, reach.positions)
        self._hear = attention(state.text_length[self._rows], reach.text)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[rows, heads, 1, head] each."""
        keys, values = self._state.keys[layer, self._rows], self._state.values[layer, self._rows]
        return self._attend(query, keys, values, (key, value))

    def cross(self, layer: int, query: Tensor) -> Tensor:
        """[rows, heads, 1, head]: both of a slot's look at its one text; the null row sees none of it."""
        assert self._state.text_keys is not None and self._state.text_values is not None
        slots = slice(len(query) // 2)
        return self._hear(query, self._state.text_keys[layer, slots], self._state.text_values[layer, slots])


class State:
    """The buffers of `capacity.slots` slots, each at rest until a request moves in."""

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
        """A prefilled request moves in, and the column after its prefill is drawn."""
        cache, length = begun.cache, begun.columns.shape[1]
        assert length <= self.capacity.columns, (length, self.capacity)
        assert cache.length + length - begun.start <= self.capacity.positions, (cache.length, self.capacity)
        assert cache.text_length <= self.capacity.text, (cache.text_length, self.capacity)
        own = slice(2 * slot, 2 * slot + 2)  # a single row is copied into both
        self.keys[:, own, :, : cache.length] = cache.keys[:, :, :, : cache.length]
        self.values[:, own, :, : cache.length] = cache.values[:, :, :, : cache.length]
        self._hear(slot, cache)
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

    def step(self, reach: Reach) -> None:
        """One more column for every slot among the leading ones that is not done."""
        slots = slice(reach.slots)
        last = self.columns[slots].gather(2, self._at(self.filled[slots] - 1))  # [slots, K, 1]
        rows = self._slot_of_row[: 2 * reach.slots]
        logits = self._decoder.logits(last, rows, StaticAttention(self, reach))
        self._take(logits.view(-1, 2, *logits.shape[1:]), slots)

    def without_a_trace(self, call: Callable[[], None]) -> None:
        """With every slot stopped a step writes only what the next one writes again."""
        end = self.end.clone()
        self.end.zero_()
        try:
            call()
        finally:
            self.end.copy_(end)

    def position(self) -> Tensor:
        """[slots]: where each slot's newest token stands behind its prefix."""
        return (self.before + self.filled - 1).clamp(max=self.capacity.positions - 1)

    def _take(self, logits: Tensor, slots: slice) -> None:
        """[slots, 2, K, card] logits of the next column -> its tokens, where they are not given."""
        drawn = self.operations.draw(
            logits,
            self.guidance[slots],
            self.temperature[slots],
            self.top_k[slots],
            self.top_p[slots],
            self.seed[slots],
            self.filled[slots],
        )
        running = self.filled[slots] < self.end[slots]
        at = self._at(torch.where(running, self.filled[slots], self.capacity.columns))
        own = self.columns[slots]
        given = own.gather(2, at)
        own.scatter_(2, at, torch.where(given == UNKNOWN, drawn[..., None], given))
        self.filled[slots].add_(running)

    def _at(self, column: Tensor) -> Tensor:
        """[slots] -> [slots, K, 1], an index into the columns."""
        return column[:, None, None].expand(-1, self._decoder.codebooks, 1)

    def _hear(self, slot: int, cache: RequestCache) -> None:
        """Only the conditional row has a text, if the request has one."""
        if self.text_keys is None or self.text_values is None:
            return
        self.text_length[2 * slot].fill_(cache.text_length)
        if cache.text is not None:
            assert (cache.rows, cache.text_rows) == (2, (0,)), "a null text that says something"
            keys, values = cache.text
            self.text_keys[:, slot, :, : cache.text_length] = keys[:, 0]
            self.text_values[:, slot, :, : cache.text_length] = values[:, 0]
