"""Decodes requests of many threads together: queueing, slots, fairness, errors and progress.

`Engine.generate` is all that a caller needs. The thread that holds the device steps every open slot, so no
request waits until another one has ended. The `Batch` does the decoding.

An error in a request's prefill or in its draw ends only this request. An error in a whole step ends every
request in the step and empties the batch, because it is not known what the step had written.

On a GPU any thread may hold the device. All threads launch on the device's default stream, so the device
computes in the order of their turns. Threads replay the graphs that another thread recorded; CUDA allows
this if they do so one at a time. The batch sets the grad mode wherever it computes, because the grad mode
belongs to a thread.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from musicgen_svc.engine.batch import Batch, DecodeRequest, Slot
from musicgen_svc.engine.decoder import Conditions
from musicgen_svc.engine.delays import first_column, num_columns
from musicgen_svc.engine.projections import Precision
from musicgen_svc.engine.sampling_params import SamplingParams
from musicgen_svc.runtime.fair_queue import TURN_S, FairQueue
from musicgen_svc.runtime.ticks import Check, Tick, no_tick

LIVE_TURN_S = TURN_S / 4
"""How long the turn of a request lasts whose frames somebody waits for: they are reported after each turn."""
OnFrames = Callable[[Tensor], None]
"""Called with tokens [K, n] on the host, n > 0; may raise to end the request."""


class StepError(Exception):
    """A decoding step failed, for one request or for all requests in it. `__cause__` is the error."""


class Engine:
    """Decodes as many requests at once as its batch has slots. More requests queue."""

    def __init__(self, batch: Batch, device_queue: FairQueue | None = None) -> None:
        """Makes an engine whose slots are all free.

        Args:
            batch: what decodes the requests.
            device_queue: is acquired for every use of the device. Others that use the device share it.
        """
        self.batch = batch
        self.decoder = batch.decoder
        self._slot_queue = FairQueue(batch.num_slots)
        self._device_queue = device_queue or FairQueue(1)

    @property
    def precision(self) -> Precision:
        """How the matrices of the layers are stored and multiplied."""
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
        on_frames: OnFrames | None = None,
    ) -> Tensor:
        """Generates the tokens of one request. Safe from many threads.

        On a CPU in fp32 they equal those of `LMModel.generate` for one request, token by token, when
        `generator` and audiocraft's global one have the same seed.

        Args:
            conditions: audiocraft's `condition_tensors`.
            prompt: [K, T0] tokens to continue, or None.
            length: the number of frames to return, the prompt's included.
            sampling: how tokens are drawn.
            generator: the source of the random numbers.
            tick: is called with how many columns are drawn and how many there are to draw; may raise to end
                the request.
            on_frames: is called with the frames that follow the prompt, in order each once, soon after all
                their codebooks are drawn. It is called in the caller's thread, which then does not hold the
                device: meanwhile other threads step this request too. None: nothing is copied for it.

        Returns:
            Tensor: [K, length] tokens, the prompt's included.

        Raises:
            StepError: a step failed.
        """
        request = DecodeRequest(conditions, prompt, length, sampling, generator)
        given = 0 if prompt is None else prompt.shape[1]
        frames = _Frames(on_frames, given)
        total = num_columns(length, self.decoder.delays) - first_column(given)

        def check() -> None:
            tick(0, total)

        # A unique group: the buffers must grow for this request, so it must be the only slot until they have.
        group = None if self.batch.has_room(request) else object()
        with self._slot_queue.acquire(check, group) as own:
            self.batch.prepare(min(self._slot_queue.length, self.batch.num_slots), check)
            slot = self._open(request, check)
            if group is not None:
                own.join_group(None)
            try:
                self._decode(slot, tick, frames)
                with self._device_queue.acquire_next():
                    codes = slot.codes
                    frames.take(slot)
            finally:
                with self._device_queue.acquire_next():
                    self.batch.close(slot)
        frames.report()
        tick(total, total)
        return codes

    def _open(self, request: DecodeRequest, check: Check) -> Slot:
        """Opens a slot for a request. Yields the device to waiting threads during the prefill."""
        with self._device_queue.acquire(check) as turn:

            def check_and_yield() -> None:
                check()
                if turn.over:
                    turn.yield_turn(check)

            return self.batch.open(request, check_and_yield)

    def _decode(self, slot: Slot, tick: Tick, frames: "_Frames") -> None:
        """Acquires the device for one turn after another, and steps the batch until the slot has ended.

        Raises:
            StepError: a step failed.
        """
        while slot.running:
            tick(*slot.progress)
            with self._device_queue.acquire(lambda: tick(*slot.progress)):
                self._step_for_a_while(slot, frames.turn_s)
                frames.take(slot)
            frames.report()
        if slot.error is not None:
            raise StepError("the decoding step failed") from slot.error

    def _step_for_a_while(self, slot: Slot, turn_s: float) -> None:
        """Steps all slots until the turn is over or `slot` has ended."""
        end = time.monotonic() + turn_s / max(len(self.batch.slots), 1)
        try:
            while slot.running and time.monotonic() < end:
                self.batch.run()
        except Exception as exc:
            for failed in self.batch.slots:
                failed.error = exc
            self.batch.clear()


class _Frames:
    """Reports the final frames of a slot: it copies them while the device is held, and reports them after."""

    def __init__(self, on_frames: OnFrames | None, start: int) -> None:
        """Without `on_frames` nothing is copied and reported. `start`: the first frame to report."""
        self._on_frames, self._start = on_frames, start
        self._taken: Tensor | None = None

    @property
    def turn_s(self) -> float:
        """How long a turn of the request lasts."""
        return TURN_S if self._on_frames is None else LIVE_TURN_S

    def take(self, slot: Slot) -> None:
        """Copies the frames that have become final. The caller must hold the device."""
        if self._on_frames is not None and slot.error is None:
            self._taken = slot.final_frames(self._start)

    def report(self) -> None:
        """Reports the frames that were copied. The caller must not hold the device."""
        taken, self._taken = self._taken, None
        if self._on_frames is not None and taken is not None and taken.shape[1]:
            self._start += taken.shape[1]
            self._on_frames(taken)
