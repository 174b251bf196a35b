"""A fixed number of places whose whole state lives on the device, for steps that never ask the host.

The host decides who has which place and how much of the buffers a step reads, and counts along; all the
rest is on the device, in `state.py`. A step computes the leading places, up to the last one in use.
"""

from dataclasses import dataclass

import torch

from musicgen_svc.engine.batch import DecodeRequest, Slot
from musicgen_svc.engine.decoder import Decoder, Pulse
from musicgen_svc.engine.delays import num_columns
from musicgen_svc.engine.graphs import Graphed
from musicgen_svc.engine.prefill import prefill
from musicgen_svc.engine.state import Capacity, Reach, State

CHUNK = 16
"""Steps between two looks of the host at the device."""

CACHE_BUCKET = 256
TEXT_BUCKET = 64
"""Attention that costs its reach is given whole buckets: one graph per number of them in use."""


@dataclass(eq=False)
class StaticSlot(Slot):
    """What the host knows of it without asking the device."""

    place: int
    before: int  # positions of its prefix
    text: int  # how much of the text buffers it uses

    @property
    def positions(self) -> int:
        """That its next step reads."""
        return self.before + self.filled


class StaticBatch:
    def __init__(self, decoder: Decoder, capacity: Capacity, *, graphs: bool) -> None:
        self.decoder = decoder
        self.places = capacity.slots
        self.slots: list[StaticSlot] = []
        self.state = State(decoder, capacity)
        self._last_made = capacity
        self.graphed: Graphed[Reach] = Graphed(self._step, decoder.device, enabled=graphs)

    def has_room(self, request: DecodeRequest) -> bool:
        """Whether the buffers are large enough; only ever false again without any."""
        return self.state.capacity.holds(*self._extent(request))

    @torch.inference_mode()
    def open(self, request: DecodeRequest, pulse: Pulse = lambda: None) -> StaticSlot:
        self._make_room(request)
        begun = prefill(self.decoder, request, spare=False, pulse=pulse)
        place = min(set(range(self.places)) - {slot.place for slot in self.slots})
        self.state.move_in(place, begun, request.sampling, seed_from(request.generator))
        slot = StaticSlot(
            columns=self.state.columns[place, :, : begun.columns.shape[1]],
            start=begun.start,
            filled=begun.start + 1,
            delays=self.decoder.delays,
            place=place,
            before=begun.cache.length - begun.start,
            text=max(begun.cache.text_length, 1),  # without any text a step still reads a bucket
        )
        self.slots.append(slot)
        return slot

    @torch.inference_mode()
    def step(self) -> None:
        """Enqueued, not awaited."""
        running = [slot for slot in self.slots if slot.running]
        if not running:
            return
        reach = Reach(
            max(slot.place for slot in running) + 1,
            max(slot.positions for slot in running),
            max(slot.text for slot in running),
        )
        self.graphed(self._bucketed(reach), self.state.without_a_trace)
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
                self.state.stop(own.place)
        self.slots = [own for own in self.slots if own is not slot]

    @torch.inference_mode()
    def clear(self) -> None:
        self.slots = []
        self.state.stop_all()

    def _step(self, reach: Reach) -> None:
        self.state.step(reach)

    def _bucketed(self, reach: Reach) -> Reach:
        """What is computed for it, so that few graphs serve all: 1, 2, 4, 8 ... slots, and whole buckets."""
        capacity = self.state.capacity

        def up(n: int, bucket: int, limit: int) -> int:
            return min(-(-n // bucket) * bucket, limit)

        slots = min(1 << (reach.slots - 1).bit_length(), capacity.slots)
        if self.decoder.operations.reads_lengths:
            return Reach(slots, capacity.positions, capacity.text)
        return Reach(
            slots,
            up(reach.positions, CACHE_BUCKET, capacity.positions),
            up(reach.text, TEXT_BUCKET, capacity.text),
        )

    def _extent(self, request: DecodeRequest) -> tuple[int, int, int]:
        """Columns, positions and text that a request takes of the buffers: the most that they may be."""
        columns = num_columns(request.length, self.decoder.delays)
        prefix, text = self.decoder.extent(request.conditions)
        return columns, prefix + columns, text

    def _make_room(self, request: DecodeRequest) -> None:
        """Longer buffers for what no released model's window asks for; only while no request is in them.

        Where there is no memory for them there are none at all: the next request has the last ones made
        anew. It comes before the prefill, which may lengthen the decoder's table of positions: recorded
        steps read the old one.
        """
        if self.has_room(request):
            return
        assert not self.slots, "buffers that are in use cannot grow"
        larger = self._last_made.for_request(*self._extent(request))
        self.graphed.forget()
        self.state = State(self.decoder, Capacity(self.places, 0, 0, 0))  # both may not fit at once
        self.state = State(self.decoder, larger)
        self._last_made = larger


def seed_from(generator: torch.Generator) -> int:
    """For the draws on the device."""
    return int(torch.randint(2**62, (), generator=generator))
