"""Slots: requests that decode together, joining and leaving between steps.

A slot is one request: its rows (a CFG pair, or one where the second could not matter), its length,
its generator and its sampling parameters. What a slot generates does not depend on the others, but
for the last bits of products that a library computes otherwise for more rows.

`generate` is all that a caller needs, from any number of threads: whoever has the turn steps every
open slot, so nobody waits for another's end. `open`, `step` and `close` are what it is written with.

What fails in one request's own part, its prefill or its draw, is its own error. A step that fails as
a whole ends every request in it, and leaves the engine empty: what it had written is no longer known.

On a GPU any thread may take any turn. All of them launch on the device's default stream, so that work
is done in the order of turns; a graph that one thread recorded is replayed by the others, which CUDA
allows one at a time; grad mode, which belongs to a thread, is set wherever a turn begins.
"""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from musicgen_svc.compat import LMModel
from musicgen_svc.engine.choice import operations_for
from musicgen_svc.engine.decoder import Conditions, Decoder, Pulse
from musicgen_svc.engine.delays import deinterleave, first_column, interleave
from musicgen_svc.engine.kv_cache import Ragged, RequestCache
from musicgen_svc.engine.projections import Precision
from musicgen_svc.engine.sampling import draw, mix
from musicgen_svc.engine.static import UNKNOWN, Capacity, StaticBatch
from musicgen_svc.request import SamplingParams
from musicgen_svc.ticks import Tick, no_tick
from musicgen_svc.turns import TURN_S, Turns

CHUNK = 16
"""On a GPU: steps between two looks of the host at the device."""


@dataclass(eq=False)
class Slot:
    """One request in the engine."""

    columns: Tensor  # [K, S], delayed; UNKNOWN from `filled` on, but for prompt and special tokens
    start: int  # the first column that is drawn
    filled: int  # columns [0, filled) are final
    delays: tuple[int, ...]
    sampling: SamplingParams
    generator: torch.Generator
    cache: RequestCache | None = None  # its own, or:
    place: int = -1  # in the static batch
    logits: Tensor | None = None  # [K, card], guided: what the last column was drawn from; not if static
    error: Exception | None = None  # that ended it before it was done

    @property
    def done(self) -> bool:
        return self.filled == self.columns.shape[1]

    @property
    def running(self) -> bool:
        return not self.done and self.error is None

    @property
    def progress(self) -> tuple[int, int]:
        """(done, total) columns of those to draw."""
        return self.filled - self.start, self.columns.shape[1] - self.start

    @property
    def codes(self) -> Tensor:
        """[K, length], when done."""
        assert self.done
        return deinterleave(self.columns, self.delays).clone()

    def take(self, logits: Tensor) -> None:
        """[rows, K, card] logits of the next column -> its tokens, where they are not given."""
        self.logits = mix(logits[0], logits[1], self.sampling.guidance) if len(logits) == 2 else logits[0]
        drawn = draw(self.logits, self.sampling, self.generator)
        column = self.columns[:, self.filled]
        self.columns[:, self.filled] = torch.where(column == UNKNOWN, drawn, column)
        self.filled += 1


class StepError(Exception):
    """A request ended by what its cause says, in a step that it may have shared with others."""


class Engine:
    """Decodes with the weights of one language model.

    slots: how many requests decode at once; more wait their turn
    static: keep every slot's state on the device, and draw there, as a GPU wants it; None: on a GPU.
        Forced off there only greedy requests run, since a generator draws on its own device alone.
    graphs: on a GPU, record the step and replay it; off, the same step runs operation by operation
    kernels: decode with Triton kernels of our own; None: on a GPU, where they work. True: or fail.
        Only where the state is static
    turn: held whenever the device is used; others may use it too. None: nobody else does
    exclusive: see `Decoder`
    """

    def __init__(
        self,
        lm: LMModel,
        *,
        slots: int = 1,
        precision: Precision = "reference",
        static: bool | None = None,
        graphs: bool = True,
        kernels: bool | None = None,
        turn: Turns | None = None,
        exclusive: bool = False,
    ) -> None:
        assert slots >= 1 and not lm.training, (slots, lm.training)
        self.precision = precision
        if static is None:
            static = lm.emb[0].weight.device.type == "cuda"
        operations = operations_for(lm, kernels if static else False)
        self.decoder = Decoder(lm, precision, operations, exclusive=exclusive)
        self._static: StaticBatch | None = None
        if static:
            self._static = StaticBatch(self.decoder, Capacity(slots), graphs=graphs)
        self._open: list[Slot] = []
        self._places = Turns(slots)
        self._turn = turn or Turns(1)

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
        columns = length + max(self.decoder.delays)
        total = columns - (0 if prompt is None else prompt.shape[1])

        def waiting() -> None:
            tick(0, total)

        kind = None if self._has_room(conditions, columns) else object()
        with self._places.taken(waiting, kind) as place:
            with self._turn.taken(waiting) as turn:

                def pulse() -> None:
                    waiting()
                    if turn.over:
                        turn.pass_on(waiting)

                slot = self.open(
                    conditions,
                    prompt=prompt,
                    length=length,
                    sampling=sampling,
                    generator=generator,
                    pulse=pulse,
                )
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
                    self.close(slot)
        tick(total, total)
        return codes

    @torch.inference_mode()
    def open(
        self,
        conditions: Conditions,
        *,
        prompt: Tensor | None,
        length: int,
        sampling: SamplingParams,
        generator: torch.Generator,
        pulse: Pulse = lambda: None,
    ) -> Slot:
        """Prefills prompt and prefix in one pass, draws the first column, and joins the others."""
        decoder = self.decoder
        given = 0 if prompt is None else prompt.shape[1]
        assert 0 <= given < length, f"{given} frames are given: no room to generate in {length}"
        codes = torch.full((decoder.codebooks, length), UNKNOWN, device=decoder.device)
        if prompt is not None:
            codes[:, :given] = prompt
        columns = interleave(codes, decoder.delays, special=decoder.card)
        start = first_column(given)
        slot = Slot(columns, start, start, decoder.delays, sampling, generator)

        prefix, text = decoder.fuse(conditions)
        rows = rows_that_matter(conditions, sampling.guidance)
        new = prefix.shape[1] + start
        to_draw = columns.shape[1] - start
        # The last column is never read, and a static batch has room of its own for what is drawn.
        cache = self._cache(rows, text, capacity=new + (to_draw - 1 if self._static is None else 0))
        attention = Ragged([cache], new)
        owner = torch.zeros(len(rows), dtype=torch.long, device=decoder.device)
        logits = decoder.logits(columns[None, :, :start], owner, attention, prefix[rows], pulse)
        attention.advance()
        if self._static is None:
            slot.cache = cache
            slot.take(logits)
        else:
            self._make_room(self._static, conditions, columns.shape[1])
            self._move_in(self._static, slot, cache, logits)
        self._open.append(slot)
        return slot

    @torch.inference_mode()
    def step(self) -> None:
        """One more column for every open slot that is not done."""
        slots = [slot for slot in self._open if slot.running]
        if not slots:
            return
        if self._static is not None:
            self._static.step()
            for slot in slots:
                slot.filled += 1
            return
        caches = [slot.cache for slot in slots if slot.cache is not None]
        rows = [cache.rows for cache in caches]
        attention = Ragged(caches, new=1)
        last = torch.stack([slot.columns[:, slot.filled - 1 : slot.filled] for slot in slots])
        owners = torch.tensor([index for index, count in enumerate(rows) for _ in range(count)])
        logits = self.decoder.logits(last, owners.to(last.device), attention)
        attention.advance()
        for slot, own in zip(slots, torch.split(logits, rows), strict=True):
            try:
                slot.take(own)
            except Exception as exc:  # a temperature that no logits survive, say: not the others' fault
                slot.error = exc

    def close(self, slot: Slot) -> None:
        """Leaves, done or not; twice is once."""
        if slot not in self._open:
            return
        self._open.remove(slot)
        if self._static is not None:
            self._static.leave(slot.place)

    def _step_for_a_while(self, slot: Slot) -> None:
        """Steps everyone until the turn is over or `slot` has ended."""
        end = time.monotonic() + TURN_S / max(len(self._open), 1)
        try:
            while slot.running and time.monotonic() < end:
                if self._static is None:
                    self.step()
                    continue
                for _ in range(CHUNK):
                    self.step()
                self._static.wait()
        except Exception as exc:
            in_it, self._open = self._open, []
            for failed in in_it:
                failed.error = exc
            if self._static is not None:
                self._static.clear()

    def _has_room(self, conditions: Conditions, columns: int) -> bool:
        """Whether the buffers are large enough for a request; only ever false again without any."""
        if self._static is None:
            return True
        prefix, text = self.decoder.extent(conditions)
        return self._static.capacity.holds(columns, prefix + columns, text)

    def _make_room(self, static: StaticBatch, conditions: Conditions, columns: int) -> None:
        """Longer buffers for what no released model's window asks for; only while no request is in them."""
        if not self._has_room(conditions, columns):
            prefix, text = self.decoder.extent(conditions)
            assert not self._open, "buffers that are in use cannot grow"
            with torch.inference_mode(False):  # they are written to outside of it, too
                static.grow(columns, prefix + columns, text)

    def _move_in(self, static: StaticBatch, slot: Slot, cache: RequestCache, logits: Tensor) -> None:
        slot.place = static.join(
            columns=slot.columns,
            start=slot.start,
            cache=cache,
            sampling=slot.sampling,
            seed=int(torch.randint(2**62, (), generator=slot.generator)),
            logits=logits,
        )
        slot.columns = static.columns[slot.place, :, : slot.columns.shape[1]]
        slot.filled += 1

    def _cache(self, rows: list[int], text: Tensor | None, capacity: int) -> RequestCache:
        decoder = self.decoder
        decoder.reserve(capacity)
        # An all-zero text (the null condition) has zero values, so attending to it adds nothing.
        text_rows = [] if text is None else [at for at, row in enumerate(rows) if text[row].any()]
        heard = None
        if text is not None and text_rows:
            heard = decoder.text_keys_values(text[[rows[at] for at in text_rows]])
        return RequestCache(
            layers=len(decoder.layers),
            rows=len(rows),
            heads=decoder.heads,
            capacity=capacity,
            head=decoder.dim // decoder.heads,
            text=heard,
            text_rows=text_rows,
            dtype=decoder.dtype,
            device=decoder.device,
        )


def rows_that_matter(conditions: Conditions, guidance: float) -> list[int]:
    """Which of the rows, 0 conditional and 1 null, guidance can tell apart.

    `null + (conditional - null) * guidance` is the null row at guidance 0, and either row where
    both are the same: no text, no melody.
    """
    if not conditions:
        return [0]
    if guidance == 0:
        return [1]
    same = all(torch.equal(embedding[0], embedding[1]) for embedding, _ in conditions.values())
    return [0] if same else [0, 1]
