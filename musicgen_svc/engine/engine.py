"""Requests of any number of threads, decoded together: queueing, slots, fairness, errors and progress.

`generate` is all that a caller needs. Whoever holds the device steps every open slot, so no request waits for
another's end. The decoding itself is a `Batch`'s, of either kind.

What fails in one request's own part, its prefill or its draw, is its own error. A step that fails as a
whole ends every request in it and leaves the batch empty: what it had written is no longer known.

On a GPU any thread may hold the device. All of them launch on the device's default stream, so that work is
done in the order of their turns. A graph that one thread recorded is replayed by the others, which CUDA
allows one at a time. Grad mode, which belongs to a thread, is set by the batch wherever it computes.
"""

import time

import torch
from torch import Tensor

from musicgen_svc.engine.batch import Batch, DecodeRequest, Slot
from musicgen_svc.engine.decoder import Conditions
from musicgen_svc.engine.delays import first_column, num_columns
from musicgen_svc.engine.projections import Precision
from musicgen_svc.engine.sampling_params import SamplingParams
from musicgen_svc.runtime.fair_queue import TURN_S, FairQueue
from musicgen_svc.runtime.ticks import Check, Tick, no_tick


class StepError(Exception):
    """A request failed in a step that it may have shared with others; `__cause__` says why."""


class Engine:
    """Decodes as many requests at once as its batch has slots. More requests queue."""

    def __init__(self, batch: Batch, device_queue: FairQueue | None = None) -> None:
        """`device_queue`: acquired whenever the device is used, which others may use too."""
        self.batch = batch
        self.decoder = batch.decoder
        self._slot_queue = FairQueue(batch.num_slots)
        self._device_queue = device_queue or FairQueue(1)

    @property
    def precision(self) -> Precision:
        return self.decoder.precision

    def generate(
        self,
        conditions: Conditions,
        *,
        prompt: Tensor | None,
        length: int,
        sampling: SamplingParams,
        generator: torch.Generator,
        tick: Tick = no_tick,
    ) -> Tensor:
        """Generates the tokens of one request. Safe from many threads.

        On a CPU in fp32 they equal those of `LMModel.generate` for one request, token by token, when
        `generator` and audiocraft's global one have the same seed.

        Args:
            conditions: audiocraft's `condition_tensors`.
            prompt: [K, T0] tokens to continue, or None.
            length: how many frames there are in the end, the prompt's among them.
            sampling: how tokens are drawn.
            generator: what they are drawn from.
            tick: counts the columns that are drawn.

        Returns:
            Tensor: [K, length] tokens, the prompt among them.

        Raises:
            StepError: a step failed.
        """
        request = DecodeRequest(conditions, prompt, length, sampling, generator)
        given = 0 if prompt is None else prompt.shape[1]
        total = num_columns(length, self.decoder.delays) - first_column(given)

        def check() -> None:
            tick(0, total)

        # A unique group: the buffers must grow for this request, so it must be the only slot until they have.
        group = None if self.batch.has_room(request) else object()
        with self._slot_queue.acquire(check, group) as own:
            slot = self._open(request, check)
            if group is not None:
                own.join_group(None)
            try:
                self._decode(slot, tick)
                with self._device_queue.acquire_next():
                    codes = slot.codes
            finally:
                with self._device_queue.acquire_next():
                    self.batch.close(slot)
        tick(total, total)
        return codes

    def _open(self, request: DecodeRequest, check: Check) -> Slot:
        """Prefills a request, and yields the device to others in between."""
        with self._device_queue.acquire(check) as turn:

            def check_and_yield() -> None:
                check()
                if turn.over:
                    turn.yield_turn(check)

            return self.batch.open(request, check_and_yield)

    def _decode(self, slot: Slot, tick: Tick) -> None:
        """Steps until the slot is done, turn by turn."""
        while slot.running:
            tick(*slot.progress)
            with self._device_queue.acquire(lambda: tick(*slot.progress)):
                self._step_for_a_while(slot)
        if slot.error is not None:
            raise StepError("the decoding step failed") from slot.error

    def _step_for_a_while(self, slot: Slot) -> None:
        """Steps all slots until the turn is over or `slot` has ended."""
        end = time.monotonic() + TURN_S / max(len(self.batch.slots), 1)
        try:
            while slot.running and time.monotonic() < end:
                self.batch.run()
        except Exception as exc:
            for failed in self.batch.slots:
                failed.error = exc
            self.batch.clear()
