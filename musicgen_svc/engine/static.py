"""A fixed number of slots whose whole state lives on the device, for steps that never ask the host.

Each slot owns two rows, its CFG pair; where one would do (see `rows_that_matter`) both hold the same.
A slot without a request computes along and keeps nothing. Draws are keyed by the request's seed and
its column (`sampling.draw_counted`), so a request is the same in any slot.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from musicgen_svc.engine.decoder import Decoder
from musicgen_svc.engine.graphs import Graphed
from musicgen_svc.engine.kv_cache import RequestCache
from musicgen_svc.engine.sampling import draw_counted, mix
from musicgen_svc.request import SamplingParams

UNKNOWN = -1
"""Stands in the columns where a token is still to be drawn."""

CACHE_BUCKET = 256
TEXT_BUCKET = 64
"""Attention reads whole buckets: one graph per number of them in use."""


@dataclass(frozen=True)
class Reach:
    """How much of the buffers a step reads."""

    positions: int
    text: int


@dataclass
class Tenant:
    """What the host knows of a slot without asking the device."""

    reach: Reach  # of its next step
    left: int  # columns to draw

    def count(self) -> None:
        """One more column is drawn, one more position will be read."""
        self.reach = Reach(self.reach.positions + 1, self.reach.text)
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
    """Attention over the first `reach` of the buffers, masked to what each slot has used."""

    def __init__(self, batch: "StaticBatch", reach: Reach) -> None:
        self._batch, self._reach = batch, reach
        last = batch.position().repeat_interleave(2)  # [rows]
        self.positions = last[:, None]
        self.cross_rows = batch.conditional_rows if batch.text_keys is not None else None
        seen = torch.arange(reach.positions, device=last.device) <= last[:, None]
        self._seen = seen[:, None, None, :]
        heard = torch.arange(reach.text, device=last.device) < batch.text_length[:, None]
        self._heard = heard[:, None, None, :]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[rows, heads, 1, head] each."""
        keys, values = self._batch.keys[layer], self._batch.values[layer]
        rows = self._batch.rows
        keys[rows, :, self.positions[:, 0]] = key[:, :, 0]
        values[rows, :, self.positions[:, 0]] = value[:, :, 0]
        used = slice(0, self._reach.positions)
        return F.scaled_dot_product_attention(
            query, keys[:, :, used], values[:, :, used], attn_mask=self._seen
        )

    def cross(self, layer: int, query: Tensor) -> Tensor:
        """[slots, heads, 1, head]: the conditional rows; the null text adds nothing."""
        assert self._batch.text_keys is not None and self._batch.text_values is not None
        keys = self._batch.text_keys[layer, :, :, : self._reach.text]
        values = self._batch.text_values[layer, :, :, : self._reach.text]
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=self._heard)


class StaticBatch:
    """The state of `capacity.slots` slots, and the step that advances all of them."""

    def __init__(self, decoder: Decoder, capacity: Capacity, *, graphs: bool) -> None:
        self._decoder = decoder
        device, slots = decoder.device, capacity.slots
        self.rows = torch.arange(2 * slots, device=device)
        self.conditional_rows = self.rows[::2]
        self._slot_of_row = self.rows // 2

        def whole(value: int = 0) -> Tensor:
            return torch.full((slots,), value, device=device)

        self.filled, self.end, self.before, self.seed = whole(1), whole(0), whole(0), whole(0)
        self.top_k, self.text_length = whole(1), whole(1)
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
        tenant = Tenant(Reach(cache.length, text), left=length - start)
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
        running = [tenant for tenant in self._tenants.values() if tenant.left]
        reach = Reach(max(t.reach.positions for t in running), max(t.reach.text for t in running))
        self._graphed(self._bucketed(reach), self._without_a_trace)
        for tenant in running:
            tenant.count()

    def wait(self) -> None:
        """Until the device has done what was enqueued."""
        if self.keys.device.type == "cuda":
            torch.cuda.current_stream(self.keys.device).synchronize()

    def _bucketed(self, reach: Reach) -> Reach:
        def up(n: int, bucket: int, limit: int) -> int:
            return min(-(-n // bucket) * bucket, limit)

        return Reach(
            up(reach.positions, CACHE_BUCKET, self.capacity.positions),
            up(reach.text, TEXT_BUCKET, self.capacity.text),
        )

    def _step(self, reach: Reach) -> None:
        last = self.columns.gather(2, self._at(self.filled - 1))  # [slots, K, 1]
        logits = self._decoder.logits(last, self._slot_of_row, StaticAttention(self, reach))
        self._take(logits.view(-1, 2, *logits.shape[1:]), slice(None))

    def _take(self, logits: Tensor, slots: slice) -> None:
        """[slots, 2, K, card] logits of the next column -> its tokens, where they are not given."""
        drawn = draw_counted(
            mix(logits[:, 0], logits[:, 1], self.guidance[slots, None, None]),
            temperature=self.temperature[slots],
            top_k=self.top_k[slots],
            top_p=self.top_p[slots],
            seed=self.seed[slots],
            step=self.filled[slots],
        )
        running = self.filled[slots] < self.end[slots]
        at = self._at(torch.where(running, self.filled[slots], self.capacity.columns))
        own = self.columns[slots]
        given = own.gather(2, at)
        own.scatter_(2, at, torch.where(given == UNKNOWN, drawn[..., None], given))
        self.filled[slots] += running

    def _at(self, column: Tensor) -> Tensor:
        """[slots] -> [slots, K, 1], an index into the columns."""
        return column[:, None, None].expand(-1, self._decoder.codebooks, 1)

    def _hear(self, slot: int, cache: RequestCache) -> None:
        """Without a text a slot hears one zero, which adds nothing."""
        if self.text_keys is None or self.text_values is None:
            return
        self.text_length[slot] = 1
        self.text_keys[:, slot, :, :1], self.text_values[:, slot, :, :1] = 0, 0
        if cache.text is not None:
            assert (cache.rows, cache.text_rows) == (2, (0,)), "a null text that says something"
            keys, values = cache.text
            length = keys.shape[3]
            self.text_keys[:, slot, :, :length] = keys[:, 0]
            self.text_values[:, slot, :, :length] = values[:, 0]
            self.text_length[slot] = length

    def _without_a_trace(self, call: Callable[[], None]) -> None:
        """With every slot stopped a step writes only what the next one writes again."""
        end = self.end.clone()
        self.end.zero_()
        call()
        self.end.copy_(end)
