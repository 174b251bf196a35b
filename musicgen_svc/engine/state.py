"""The state of a static batch on the device, and the protocol of a step that reads and writes it.

Each slot owns two rows, conditional and null. If the request needs one row only (see `needed_rows`), both
rows hold the same numbers. A step computes the leading slots. A slot among them that is not running is
computed too, but its result is discarded. Draws depend on the request's seed and its column only
(`sampling.draw_counted`), so a request gives the same tokens in any slot.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from musicgen_svc.engine.decoder import Decoder
from musicgen_svc.engine.kv_cache import RequestCache
from musicgen_svc.engine.prefill import Prefilled
from musicgen_svc.engine.sampling_params import SamplingParams
from musicgen_svc.runtime.ticks import Check


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


class Step(Protocol):
    """How a step of a static batch is computed: in plain PyTorch (`plain_step.py`) or by `chain`."""

    name: str
    """"plain" or "kernels"."""
    reads_lengths: bool
    """Whether the cost of attention depends on the lengths. If not, it depends on the extent."""

    def logits(self, state: "DeviceState", extent: ActiveExtent) -> Tensor:
        """Computes the logits that follow the last column of each leading slot: [slots, 2, K, card].

        The conditional row of a slot comes first. The new keys and values are stored in the state.
        """

    def compile(self, state: "DeviceState", slots: int, check: Check) -> None:
        """Compiles what a step of this many leading slots needs. May be called beside a step.

        `check` is called now and then, and may raise to give up.
        """

    def draw(self, state: "DeviceState", logits: Tensor, slots: slice) -> None:
        """Draws the unknown tokens of the next column of some slots, and counts the column.

        Nothing changes for a slot that is stopped.

        Args:
            state: holds the columns, and how each slot's tokens are drawn.
            logits: [slots, 2, K, card].
            slots: which slots these are.
        """


class DeviceState:
    """The buffers of `capacity.slots` slots. A slot is stopped until it is opened for a request.

    Attributes:
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
        self.capacity = capacity
        device, slots = decoder.device, capacity.slots
        layers, heads, head = len(decoder.layers), decoder.heads, decoder.head_dim

        def per_slot(value: int = 0) -> Tensor:
            return torch.full((slots,), value, device=device)

        def buffer(rows: int, length: int) -> Tensor:
            return torch.zeros(layers, rows, heads, length, head, dtype=decoder.dtype, device=device)

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
        """Copies a prefilled request into a slot, whose first column is still to draw.

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
        self.set_sampling(slot, sampling, seed)
        self.filled[slot].fill_(prefilled.start)  # an assignment would copy from the host, and wait
        self.end[slot].fill_(length)
        self.prefix_length[slot].fill_(cache.length - prefilled.start)

    def set_sampling(self, slot: int, sampling: SamplingParams, seed: int) -> None:
        """Sets how a slot's tokens are drawn."""
        for per_slot, number in (
            (self.temperature, sampling.temperature), (self.guidance, sampling.guidance),
            (self.top_k, sampling.top_k), (self.top_p, sampling.top_p), (self.seed, seed),
        ):  # fmt: skip
            per_slot[slot].fill_(number)

    def stop(self, slot: int) -> None:
        """Stops a slot: the following steps do not change it."""
        self.end[slot].fill_(0)

    def stop_all(self) -> None:
        """Stops all slots."""
        self.end.zero_()

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
