"""Requests of any number of threads, decoded together: turns, places, fairness, errors and progress.

`generate` is all that a caller needs: whoever has the turn steps every open slot, so nobody waits for
another's end. The decoding itself is a `Batch`'s, of whichever kind.

What fails in one request's own part, its prefill or its draw, is its own error. A step that fails as
a whole ends every request in it, and leaves the batch empty: what it had written is no longer known.

On a GPU any thread may take any turn. All of them launch on the device's default stream, so that work
is done in the order of turns; a graph that one thread recorded is replayed by the others, which CUDA
allows one at a time; grad mode, which belongs to a thread, is set by the batch wherever it computes.
"""

import time

import torch
from torch import Tensor

from musicgen_svc.engine.batch import Batch, DecodeRequest, Slot
from musicgen_svc.engine.decoder import Conditions
from musicgen_svc.engine.delays import first_column, num_columns
from musicgen_svc.engine.projections import Precision
from musicgen_svc.request import SamplingParams
from musicgen_svc.ticks import Tick, no_tick
from musicgen_svc.turns import TURN_S, Turns


class StepError(Exception):
    """A request ended by what its cause says, in a step that it may have shared with others."""


class Engine:
    """Decodes as many requests at once as its batch has places; more wait their turn.

    turn: held whenever the device is used; others may use it too. None: nobody else does
    """

    def __init__(self, batch: Batch, turn: Turns | None = None) -> None:
        self.batch = batch
        self.decoder = batch.decoder
        self._places = Turns(batch.places)
        self._turn = turn or Turns(1)

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
        """Prompt [K, T0] or None -> [K, length] tokens, the prompt among them; safe from many threads.

        Equals `LMModel.generate` for one request, token by token on a CPU in fp32, when `generator`
        and audiocraft's global one have the same seed. `tick` counts the columns to draw.
        """
        request = DecodeRequest(conditions, prompt, length, sampling, generator)
        given = 0 if prompt is None else prompt.shape[1]
        total = num_columns(length, self.decoder.delays) - first_column(given)

        def waiting() -> None:
            tick(0, total)

        kind = None if self.batch.has_room(request) else object()  # a kind of its own is alone
        with self._places.taken(waiting, kind) as place:
            with self._turn.taken(waiting) as turn:

                def pulse() -> None:
                    waiting()
                    if turn.over:
                        turn.pass_on(waiting)

                slot = self.batch.open(request, pulse)
            if kind is not None:  # there is room for all, now that the buffers have grown
                place.share(None)
            try:
                while slot.running:
                    tick(*slot.progress)
                    with self._turn.taken(lambda: tick(*slot.progress)):
                        self._step_for_a_while(slot)
                if slot.error is not None:
                    raise StepError("the decoding step failed") from slot.error
                with self._turn.taken_next():
                    codes = slot.codes
            finally:
                with self._turn.taken_next():
                    self.batch.close(slot)
        tick(total, total)
        return codes

    def _step_for_a_while(self, slot: Slot) -> None:
        """Steps everyone until the turn is over or `slot` has ended."""
        end = time.monotonic() + TURN_S / max(len(self.batch.slots), 1)
        try:
            while slot.running and time.monotonic() < end:
                self.batch.run()
        except Exception as exc:
            for failed in self.batch.slots:
                failed.error = exc
            self.batch.clear()
