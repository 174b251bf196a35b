"""Slots that each own a cache of just their length, and draw on the host from their own generator.

What a slot costs is what it asked for. Rows are computed together, attention and draws slot by slot.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from musicgen_svc.engine.batch import UNKNOWN, DecodeRequest, Slot
from musicgen_svc.engine.decoder import Decoder, Pulse
from musicgen_svc.engine.kv_cache import RaggedAttention, RequestCache
from musicgen_svc.engine.prefill import prefill
from musicgen_svc.engine.sampling import draw, mix
from musicgen_svc.request import SamplingParams


@dataclass(eq=False)
class RaggedSlot(Slot):
    cache: RequestCache
    sampling: SamplingParams
    generator: torch.Generator
    logits: Tensor = field(init=False)  # [K, card], guided: what the last column was drawn from

    def take(self, logits: Tensor) -> None:
        """[rows, K, card] logits of the next column -> its tokens, where they are not given."""
        self.logits = mix(logits[0], logits[1], self.sampling.guidance) if len(logits) == 2 else logits[0]
        drawn = draw(self.logits, self.sampling, self.generator)
        column = self.columns[:, self.filled]
        self.columns[:, self.filled] = torch.where(column == UNKNOWN, drawn, column)
        self.filled += 1


class RaggedBatch:
    """A generator draws on its own device alone: on a GPU only greedy requests run here."""

    def __init__(self, decoder: Decoder, places: int) -> None:
        self.decoder = decoder
        self.places = places
        self.slots: list[RaggedSlot] = []

    def has_room(self, request: DecodeRequest) -> bool:
        return True

    @torch.inference_mode()
    def open(self, request: DecodeRequest, pulse: Pulse = lambda: None) -> RaggedSlot:
        begun = prefill(self.decoder, request, spare=True, pulse=pulse)
        slot = RaggedSlot(
            columns=begun.columns,
            start=begun.start,
            filled=begun.start,
            delays=self.decoder.delays,
            cache=begun.cache,
            sampling=request.sampling,
            generator=request.generator,
        )
        slot.take(begun.logits)
        self.slots.append(slot)
        return slot

    @torch.inference_mode()
    def step(self) -> None:
        """A draw that fails is its slot's own error. A forward that fails can be repeated."""
        slots = [slot for slot in self.slots if slot.running]
        if not slots:
            return
        rows = [slot.cache.rows for slot in slots]
        attention = RaggedAttention([slot.cache for slot in slots], new=1)
        last = torch.stack([slot.columns[:, slot.filled - 1 : slot.filled] for slot in slots])
        owners = torch.tensor([index for index, count in enumerate(rows) for _ in range(count)])
        logits = self.decoder.logits(last, owners.to(last.device), attention)
        attention.advance()
        for slot, own in zip(slots, torch.split(logits, rows), strict=True):
            try:
                slot.take(own)
            except Exception as exc:  # a temperature that no logits survive, say: not the others' fault
                slot.error = exc

    def run(self) -> None:
        """One: every draw is the host's, which therefore looks at each step."""
        self.step()

    def close(self, slot: Slot) -> None:
        self.slots = [other for other in self.slots if other is not slot]

    def clear(self) -> None:
        self.slots = []
