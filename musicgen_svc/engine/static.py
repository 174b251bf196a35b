"""The batch for a GPU: a fixed number of slots whose state is on the device. A step never waits for the host.

The host decides which request has which slot and how much of the buffers a step reads, and counts the
columns. Everything else is on the device, see `state.py`. A step computes the leading slots, up to the last
one in use.
"""

import logging
from dataclasses import dataclass
from threading import Lock

import torch

from musicgen_svc.engine.batch import DecodeRequest, Slot
from musicgen_svc.engine.decoder import Decoder
from musicgen_svc.engine.delays import num_columns
from musicgen_svc.engine.graphs import Graphed
from musicgen_svc.engine.plain_step import PlainStep
from musicgen_svc.engine.prefill import prefill
from musicgen_svc.engine.state import ActiveExtent, Capacity, DeviceState, Step
from musicgen_svc.errors import first_line
from musicgen_svc.runtime.ticks import CHECK_S, Check, no_check

CHUNK = 16
"""The number of steps that the host enqueues before it waits for the device."""

CACHE_BUCKET = 256
TEXT_BUCKET = 64
"""Positions and text tokens to which an extent is rounded up, so that few graphs serve all extents.

Only used if the cost of attention depends on the extent (`Step.reads_lengths` is false).
"""


@dataclass(eq=False)
class StaticSlot(Slot):
    """A slot, with what the host knows of it without waiting for the device."""

    index: int
    prefix_length: int  # positions
    text: int  # tokens of the text that its steps read

    @property
    def positions(self) -> int:
        """How many positions the slot's next step reads."""
        return self.prefix_length + self.filled


class StaticBatch:
    """The batch for a GPU.

    Attributes:
        path: which way steps are computed, the name of the `Step`.
        state: the buffers on the device.
        graphed: the step, which is recorded once for each extent and replayed.
    """

    def __init__(self, decoder: Decoder, step: Step, capacity: Capacity, *, graphs: bool) -> None:
        """Allocates the buffers.

        Args:
            decoder: computes the prefill.
            step: computes the steps.
            capacity: the size of the buffers, which may grow for a longer request.
            graphs: whether steps are recorded as CUDA graphs.
        """
        self.decoder = decoder
        self.path = step.name
        self._step = step
        self.num_slots = capacity.slots
        self.slots: list[StaticSlot] = []
        self.state = DeviceState(decoder, capacity)
        self._wanted_capacity = capacity
        self._compiling, self._compiled = Lock(), set[int]()  # numbers of slots
        self._replaced: dict[int, Step] = {}  # by number of slots, where the step could not be compiled
        self.graphed: Graphed[ActiveExtent] = Graphed(self._compute, decoder.device, enabled=graphs)

    def has_room(self, request: DecodeRequest) -> bool:
        """Whether the buffers are large enough. Turns false again only if growing the buffers failed."""
        return self.state.capacity.holds(*self._needs(request))

    @torch.inference_mode()
    def prepare(self, slots: int, check: Check = no_check) -> None:
        """Compiles the steps of up to this many slots, as `Batch.prepare`.

        Steps of a number of slots whose kernels cannot be compiled are computed in plain PyTorch.
        """
        while not self._compiling.acquire(timeout=CHECK_S):
            check()
        try:
            computed = {self._rounded_up(number) for number in range(1, slots + 1)}
            for number in sorted(computed - self._compiled):
                self._compile(number, check)
        finally:
            self._compiling.release()

    def _compile(self, slots: int, check: Check) -> None:
        """Compiles the step of a number of slots, or replaces it."""
        given_up = False

        def check_and_note() -> None:
            nonlocal given_up
            given_up = True
            check()
            given_up = False

        try:
            self._step.compile(self.state, slots, check_and_note)
        except Exception as exc:  # the errors of a compiler and a driver have no common class
            if given_up:
                raise
            logging.getLogger(__name__).warning(
                "Decoding %d slots at once without kernels, because %s", slots, first_line(exc)
            )
            self._replaced[slots] = PlainStep(self.decoder)
        self._compiled.add(slots)

    @torch.inference_mode()
    def open(self, request: DecodeRequest, check: Check = no_check) -> StaticSlot:
        """Opens the free slot with the lowest index, as `Batch.open`."""
        self._make_room(request)
        prefilled = prefill(self.decoder, request, room_to_decode=False, check=check)
        index = min(set(range(self.num_slots)) - {slot.index for slot in self.slots})
        self.state.open_slot(index, prefilled, request.sampling, seed_from(request.generator))
        self._step.draw(self.state, prefilled.logits.expand(2, -1, -1)[None], slice(index, index + 1))
        slot = StaticSlot(
            columns=self.state.columns[index, :, : prefilled.columns.shape[1]],
            start=prefilled.start,
            filled=prefilled.start + 1,
            delays=self.decoder.delays,
            index=index,
            prefix_length=prefilled.cache.length - prefilled.start,
            text=max(prefilled.cache.text_length, 1),  # a step reads a bucket of text even if no slot has one
        )
        self.slots.append(slot)
        return slot

    @torch.inference_mode()
    def step(self) -> None:
        """Enqueues one step for the running slots, and does not wait for it."""
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
        """Computes `CHUNK` steps, and waits for the device."""
        for _ in range(CHUNK):
            self.step()
        device = self.decoder.device
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()

    @torch.inference_mode()
    def close(self, slot: Slot) -> None:
        """Removes the slot, finished or not. Idempotent."""
        for own in self.slots:
            if own is slot:
                self.state.stop(own.index)
        self.slots = [own for own in self.slots if own is not slot]

    @torch.inference_mode()
    def clear(self) -> None:
        """Removes all slots."""
        self.slots = []
        self.state.stop_all()

    def _compute(self, extent: ActiveExtent) -> None:
        """Computes a step of the present `self.state`, which is another object after the buffers grow.

        Args:
            extent: how much of the buffers is read. It must include every running slot's columns.
        """
        step = self._step_of(extent.slots)
        step.draw(self.state, step.logits(self.state, extent), slice(extent.slots))

    def _step_of(self, slots: int) -> Step:
        """Returns what computes the steps of a number of slots."""
        return self._replaced.get(slots, self._step)

    def _rounded_up(self, slots: int) -> int:
        """Rounds a number of slots up to 1, 2, 4, 8 ... within the capacity."""
        return min(1 << (slots - 1).bit_length(), self.num_slots)

    def _bucketed(self, extent: ActiveExtent) -> ActiveExtent:
        """Rounds an extent up to 1, 2, 4, 8 ... slots and to whole buckets, within the capacity."""
        capacity = self.state.capacity

        def round_up(n: int, bucket: int, limit: int) -> int:
            return min(-(-n // bucket) * bucket, limit)

        slots = self._rounded_up(extent.slots)
        if self._step_of(slots).reads_lengths:
            return ActiveExtent(slots, capacity.positions, capacity.text)
        return ActiveExtent(
            slots,
            round_up(extent.positions, CACHE_BUCKET, capacity.positions),
            round_up(extent.text, TEXT_BUCKET, capacity.text),
        )

    def _needs(self, request: DecodeRequest) -> tuple[int, int, int]:
        """Returns upper bounds of the columns, positions and text tokens that a request needs."""
        columns = num_columns(request.length, self.decoder.delays)
        prefix, text = self.decoder.condition_lengths(request.conditions)
        return columns, prefix + columns, text

    def _make_room(self, request: DecodeRequest) -> None:
        """Grows the buffers for a request that they cannot hold.

        No slot may be open. If there is not enough memory for larger buffers, the batch has none, and the
        next request allocates buffers of the previous size again. This must be done before the prefill: the
        prefill may replace the decoder's position embeddings, which recorded steps read, so the recordings
        must be dropped first.
        """
        if self.has_room(request):
            return
        assert not self.slots, "buffers that are in use cannot grow"
        larger = self._wanted_capacity.for_request(*self._needs(request))
        self.graphed.forget()
        self.state = DeviceState(
            self.decoder, Capacity(self.num_slots, 0, 0, 0)
        )  # the old and the new buffers may not fit together
        self.state = DeviceState(self.decoder, larger)
        self._wanted_capacity = larger


def seed_from(generator: torch.Generator) -> int:
    """Draws a seed for the draws on the device from a request's generator."""
    return int(torch.randint(2**62, (), generator=generator))
