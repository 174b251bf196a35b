"""A batch with a fixed number of slots whose whole state lives on the device: a step never waits for the
host.

The host decides which request has which slot and how much of the buffers a step reads, and counts the
columns. All the rest is on the device, in `state.py`. A step computes the leading slots, up to the last one
in use.
"""

from dataclasses import dataclass

import torch

from musicgen_svc.engine.batch import DecodeRequest, Slot
from musicgen_svc.engine.decoder import Decoder
from musicgen_svc.engine.delays import num_columns
from musicgen_svc.engine.graphs import Graphed
from musicgen_svc.engine.prefill import prefill
from musicgen_svc.engine.state import ActiveExtent, Capacity, DeviceState
from musicgen_svc.runtime.ticks import Check, no_check

CHUNK = 16
"""Steps between two waits of the host for the device."""

CACHE_BUCKET = 256
TEXT_BUCKET = 64
"""Attention whose cost is the active extent gets whole buckets, so that few graphs serve all extents."""


@dataclass(eq=False)
class StaticSlot(Slot):
    """What the host knows of a slot without waiting for the device."""

    index: int
    before: int  # positions of its prefix
    text: int  # how much of the text buffers it uses

    @property
    def positions(self) -> int:
        """How many positions its next step reads."""
        return self.before + self.filled


class StaticBatch:
    """The batch for a GPU."""

    def __init__(self, decoder: Decoder, capacity: Capacity, *, graphs: bool) -> None:
        self.decoder = decoder
        self.num_slots = capacity.slots
        self.slots: list[StaticSlot] = []
        self.state = DeviceState(decoder, capacity)
        self._last_made = capacity
        self.graphed: Graphed[ActiveExtent] = Graphed(self._step, decoder.device, enabled=graphs)

    def has_room(self, request: DecodeRequest) -> bool:
        """Whether the buffers are large enough. Turns false again only if growing the buffers failed."""
        return self.state.capacity.holds(*self._extent(request))

    @torch.inference_mode()
    def open(self, request: DecodeRequest, check: Check = no_check) -> StaticSlot:
        self._make_room(request)
        begun = prefill(self.decoder, request, spare=False, check=check)
        index = min(set(range(self.num_slots)) - {slot.index for slot in self.slots})
        self.state.move_in(index, begun, request.sampling, seed_from(request.generator))
        slot = StaticSlot(
            columns=self.state.columns[index, :, : begun.columns.shape[1]],
            start=begun.start,
            filled=begun.start + 1,
            delays=self.decoder.delays,
            index=index,
            before=begun.cache.length - begun.start,
            text=max(begun.cache.text_length, 1),  # without any text a step still reads a bucket
        )
        self.slots.append(slot)
        return slot

    @torch.inference_mode()
    def step(self) -> None:
        """Enqueues one step, and does not wait for it."""
        running = [slot for slot in self.slots if slot.running]
        if not running:
            return
        extent = ActiveExtent(
            max(slot.index for slot in running) + 1,
            max(slot.positions for slot in running),
            max(slot.text for slot in running),
        )
        self.graphed(self._bucketed(extent), self.state.with_all_slots_stopped)
        for slot in running:
            slot.filled += 1

    def run(self) -> None:
        for _ in range(CHUNK):
            self.step()
        device = self.decoder.device
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()

    @torch.inference_mode()
    def close(self, slot: Slot) -> None:
        for own in self.slots:
            if own is slot:
                self.state.stop(own.index)
        self.slots = [own for own in self.slots if own is not slot]

    @torch.inference_mode()
    def clear(self) -> None:
        self.slots = []
        self.state.stop_all()

    def _step(self, extent: ActiveExtent) -> None:
        self.state.step(extent)

    def _bucketed(self, extent: ActiveExtent) -> ActiveExtent:
        """The extent that is computed for this one: 1, 2, 4, 8 ... slots, and whole buckets."""
        capacity = self.state.capacity

        def up(n: int, bucket: int, limit: int) -> int:
            return min(-(-n // bucket) * bucket, limit)

        slots = min(1 << (extent.slots - 1).bit_length(), capacity.slots)
        if self.decoder.operations.reads_lengths:
            return ActiveExtent(slots, capacity.positions, capacity.text)
        return ActiveExtent(
            slots,
            up(extent.positions, CACHE_BUCKET, capacity.positions),
            up(extent.text, TEXT_BUCKET, capacity.text),
        )

    def _extent(self, request: DecodeRequest) -> tuple[int, int, int]:
        """The columns, positions and text of the buffers that a request needs at most."""
        columns = num_columns(request.length, self.decoder.delays)
        prefix, text = self.decoder.extent(request.conditions)
        return columns, prefix + columns, text

    def _make_room(self, request: DecodeRequest) -> None:
        """Grows the buffers for a request that is longer than any released model's window.

        No other slot may be open. If there is no memory for longer buffers, none are left: the next request
        gets buffers of the last size again. This comes before the prefill, which may lengthen the decoder's
        table of positions, because recorded steps read the old table.
        """
        if self.has_room(request):
            return
        assert not self.slots, "buffers that are in use cannot grow"
        larger = self._last_made.for_request(*self._extent(request))
        self.graphed.forget()
        self.state = DeviceState(self.decoder, Capacity(self.num_slots, 0, 0, 0))  # both may not fit at once
        self.state = DeviceState(self.decoder, larger)
        self._last_made = larger


def seed_from(generator: torch.Generator) -> int:
    """A seed for the draws on the device, taken from a request's generator."""
    return int(torch.randint(2**62, (), generator=generator))
