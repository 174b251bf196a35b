"""A fixed number of slots whose whole state lives on the device, for steps that never ask the host.

Each slot owns two rows, its CFG pair; where one would do (see `rows_that_matter`) both hold the same.
A step computes the leading slots, up to the last one that is running; one among them that is not
computes along and keeps nothing. Draws are keyed by the request's seed and its column
(`sampling.draw_counted`), so a request is the same in any slot.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from musicgen_svc.engine.decoder import Decoder
from musicgen_svc.engine.graphs import Graphed
from musicgen_svc.engine.kv_cache import RequestCache
from musicgen_svc.request import SamplingParams

UNKNOWN = -1
"""Stands in the columns where a token is still to be drawn."""

CACHE_BUCKET = 256
TEXT_BUCKET = 64
"""Attention that costs its reach is given whole buckets: one graph per number of them in use."""


@dataclass(frozen=True)
class Reach:
    """How much of the buffers a step reads."""

    slots: int
    positions: int
    text: int


@dataclass
class Tenant:
    """What the host knows of a slot without asking the device."""

    positions: int  # that its next step reads
    text: int
    left: int  # columns to draw

    def count(self) -> None:
        """One more column is drawn, one more position will be read."""
        self.positions += 1
        self.left -= 1


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


class StaticAttention:
    """Attention over what each row of the leading slots has used of the buffers."""

    cross_rows = None
    """A row without a text hears nothing, which costs less than to leave it out."""

    def __init__(self, batch: "StaticBatch", reach: Reach) -> None:
        self._batch, self._rows = batch, slice(2 * reach.slots)
        last = batch.position()[: reach.slots, None].expand(-1, 2).flatten()  # [rows]
        self.positions = last[:, None]
        attention = batch.operations.attention
        self._attend = attention(last + 1, reach.positions)
        self._hear = attention(batch.text_length[self._rows], reach.text)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[rows, heads, 1, head] each."""
        keys, values = self._batch.keys[layer, self._rows], self._batch.values[layer, self._rows]
        return self._attend(query, keys, values, (key, value))

    def cross(self, layer: int, query: Tensor) -> Tensor:
        """[rows, heads, 1, head]: both of a slot's look at its one text; the null row sees none of it."""
        assert self._batch.text_keys is not None and self._batch.text_values is not None
        slots = slice(len(query) // 2)
        return self._hear(query, self._batch.text_keys[layer, slots], self._batch.text_values[layer, slots])


class StaticBatch:
    """The state of `capacity.slots` slots, and the step that advances all of them."""

    def __init__(self, decoder: Decoder, capacity: Capacity, *, graphs: bool) -> None:
        self._decoder = decoder
        self.operations = decoder.operations
        device, slots = decoder.device, capacity.slots
        self._slot_of_row = torch.arange(2 * slots, device=device) // 2

        def whole(value: int = 0) -> Tensor:
            return torch.full((slots,), value, device=device)

        self.filled, self.end, self.before, self.seed = whole(1), whole(0), whole(0), whole(0)
        self.top_k = whole(1)
        self.text_length = torch.zeros(2 * slots, dtype=torch.long, device=device)  # [rows]
        self.temperature, self.top_p, self.guidance = (torch.zeros(slots, device=device) for _ in range(3))

        self._tenants: dict[int, Tenant] = {}
        self._graphed: Graphed[Reach] = Graphed(self._step, device, enabled=graphs)
        self._allocate(capacity)

    def _allocate(self, capacity: Capacity) -> None:
        decoder = self._decoder
        device, slots = decoder.device, capacity.slots
        layers, heads = len(decoder.layers), decoder.heads
        head = decoder.dim // heads

        def buffer(rows: int, length: int) -> Tensor:
            return torch.zeros(layers, rows, heads, length, head, dtype=decoder.dtype, device=device)

        # One column more than a request has: where slots that are not running write.
        self.columns = torch.zeros(
            slots, decoder.codebooks, capacity.columns + 1, dtype=torch.long, device=device
        )
        self.keys, self.values = (buffer(2 * slots, capacity.positions) for _ in range(2))
        self.text_keys = buffer(slots, capacity.text) if decoder.has_text else None
        self.text_values = buffer(slots, capacity.text) if decoder.has_text else None
        decoder.reserve(capacity.positions)
        self.capacity = self._last_made = capacity

    def grow(self, columns: int, positions: int, text: int) -> None:
        """Longer buffers, for such a request too, while nobody is in them.

        Where there is no memory for them there are none at all: the next request has the last ones made
        anew.
        """
        assert not self._tenants
        self.capacity = Capacity(self.capacity.slots, 0, 0, 0)
        self._graphed.forget()
        self.columns = self.keys = self.values = self.columns.new_empty(0)  # both may not fit at once
        self.text_keys = self.text_values = None
        self._allocate(self._last_made.for_request(columns, positions, text))

    def position(self) -> Tensor:
        """[slots]: where each slot's newest token stands behind its prefix."""
        return (self.before + self.filled - 1).clamp(max=self.capacity.positions - 1)

    def join(
        self,
        *,
        columns: Tensor,
        start: int,
        cache: RequestCache,
        sampling: SamplingParams,
        seed: int,
        logits: Tensor,
    ) -> int:
        """A prefilled request moves in, and the column after its prefill is drawn. Returns its slot.

        columns: [K, S]; cache: what the prefill of `start` columns stored; logits: [rows, K, card]
        """
        slot = min(set(range(self.capacity.slots)) - self._tenants.keys())
        length = columns.shape[1]
        text = 1 if cache.text is None else cache.text[0].shape[3]
        tenant = Tenant(cache.length, text, left=length - start)
        assert length <= self.capacity.columns, (length, self.capacity)
        assert cache.length + tenant.left <= self.capacity.positions, (cache.length, self.capacity)
        assert text <= self.capacity.text, (text, self.capacity)
        own = slice(2 * slot, 2 * slot + 2)  # a single row is copied into both
        self.keys[:, own, :, : cache.length] = cache.keys[:, :, :, : cache.length]
        self.values[:, own, :, : cache.length] = cache.values[:, :, :, : cache.length]
        self._hear(slot, cache)
        self.columns[slot, :, :length] = columns
        self.filled[slot], self.end[slot], self.before[slot] = start, length, cache.length - start
        self.temperature[slot], self.guidance[slot] = sampling.temperature, sampling.guidance
        self.top_k[slot], self.top_p[slot], self.seed[slot] = sampling.top_k, sampling.top_p, seed
        self._take(logits.expand(2, -1, -1)[None], slice(slot, slot + 1))
        tenant.count()
        self._tenants[slot] = tenant
        return slot

    def leave(self, slot: int) -> None:
        del self._tenants[slot]
        self.end[slot] = 0

    def clear(self) -> None:
        """Everybody leaves, after a step that failed."""
        self._tenants.clear()
        self.end.zero_()

    def step(self) -> None:
        """One more column for every slot that is not done. Enqueued, not awaited."""
        running = {slot: tenant for slot, tenant in self._tenants.items() if tenant.left}
        reach = Reach(
            max(running) + 1,
            max(tenant.positions for tenant in running.values()),
            max(tenant.text for tenant in running.values()),
        )
        self._graphed(self._bucketed(reach), self._without_a_trace)
        for tenant in running.values():
            tenant.count()

    def wait(self) -> None:
        """Until the device has done what was enqueued."""
        if self.keys.device.type == "cuda":
            torch.cuda.current_stream(self.keys.device).synchronize()

    def _bucketed(self, reach: Reach) -> Reach:
        """What is computed for it, so that few graphs serve all: 1, 2, 4, 8 ... slots, and whole buckets."""

        def up(n: int, bucket: int, limit: int) -> int:
            return min(-(-n // bucket) * bucket, limit)

        slots = min(1 << (reach.slots - 1).bit_length(), self.capacity.slots)
        if self.operations.reads_lengths:
            return Reach(slots, self.capacity.positions, self.capacity.text)
        return Reach(
            slots,
            up(reach.positions, CACHE_BUCKET, self.capacity.positions),
            up(reach.text, TEXT_BUCKET, self.capacity.text),
        )

    def _step(self, reach: Reach) -> None:
        slots = slice(reach.slots)
        last = self.columns[slots].gather(2, self._at(self.filled[slots] - 1))  # [slots, K, 1]
        rows = self._slot_of_row[: 2 * reach.slots]
        logits = self._decoder.logits(last, rows, StaticAttention(self, reach))
        self._take(logits.view(-1, 2, *logits.shape[1:]), slots)

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
        self.text_length[2 * slot] = 0
        if cache.text is not None:
            assert (cache.rows, cache.text_rows) == (2, (0,)), "a null text that says something"
            keys, values = cache.text
            length = keys.shape[3]
            self.text_keys[:, slot, :, :length] = keys[:, 0]
            self.text_values[:, slot, :, :length] = values[:, 0]
            self.text_length[2 * slot] = length

    def _without_a_trace(self, call: Callable[[], None]) -> None:
        """With every slot stopped a step writes only what the next one writes again."""
        end = self.end.clone()
        self.end.zero_()
        call()
        self.end.copy_(end)
