"""The batch for a CPU: each slot owns a cache of exactly its length, and the host draws its tokens.

A step computes the products of all rows together, and attention and draws slot by slot.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from musicgen_svc.engine.batch import UNKNOWN, DecodeRequest, Slot
from musicgen_svc.engine.decoder import Decoder
from musicgen_svc.engine.kv_cache import RaggedAttention, RequestCache
from musicgen_svc.engine.prefill import prefill
from musicgen_svc.engine.sampling import draw, mix
from musicgen_svc.engine.sampling_params import SamplingParams
from musicgen_svc.runtime.ticks import Check, no_check


@dataclass(eq=False)
class RaggedSlot(Slot):
    """A slot with its own cache and random generator."""

    cache: RequestCache
    sampling: SamplingParams
    generator: torch.Generator
    logits: Tensor = field(init=False)  # [K, card], after guidance, from which the last column was drawn

    def draw_column(self, logits: Tensor) -> None:
        """Draws the unknown tokens of the next column from logits [rows, K, card]."""
        self.logits = mix(logits[0], logits[1], self.sampling.guidance) if len(logits) == 2 else logits[0]
        drawn = draw(self.logits, self.sampling, self.generator)
        column = self.columns[:, self.filled]
        self.columns[:, self.filled] = torch.where(column == UNKNOWN, drawn, column)
        self.filled += 1


class RaggedBatch:
    """The batch for a CPU.

    A generator can draw on its own device only, so on a GPU this batch can decode greedy requests only.
    """

    def __init__(self, decoder: Decoder, num_slots: int) -> None:
        self.decoder = decoder
        self.num_slots = num_slots
        self.slots: list[RaggedSlot] = []

    def has_room(self, request: DecodeRequest) -> bool:
        """Always, because each slot has its own cache."""
        return True

    @torch.inference_mode()
    def prepare(self, slots: int, check: Check = no_check) -> None:
        """Does nothing, as nothing is compiled."""

    def open(self, request: DecodeRequest, check: Check = no_check) -> RaggedSlot:
        """Opens a slot, as `Batch.open`."""
        prefilled = prefill(self.decoder, request, room_to_decode=True, check=check)
        slot = RaggedSlot(
            columns=prefilled.columns,
            start=prefilled.start,
            filled=prefilled.start,
            delays=self.decoder.delays,
            cache=prefilled.cache,
            sampling=request.sampling,
            generator=request.generator,
        )
        slot.draw_column(prefilled.logits)
        self.slots.append(slot)
        return slot

    @torch.inference_mode()
    def step(self) -> None:
        """Computes one more column for every running slot.

        A draw that fails sets the error of its slot only. A forward pass that fails can be repeated.
        """
        slots = [slot for slot in self.slots if slot.running]
        if not slots:
            return
        rows = [slot.cache.rows for slot in slots]
        attention = RaggedAttention([slot.cache for slot in slots], new=1)
        last = torch.stack([slot.columns[:, slot.filled - 1 : slot.filled] for slot in slots])
        request_of_row = torch.tensor([index for index, count in enumerate(rows) for _ in range(count)])
        logits = self.decoder.logits(last, request_of_row.to(last.device), attention)
        attention.advance()
        for slot, own in zip(slots, torch.split(logits, rows), strict=True):
            try:
                slot.draw_column(own)
            except Exception as exc:  # for instance a temperature that makes all logits infinite
                slot.error = exc

    def run(self) -> None:
        """Computes one step. The host draws the tokens, so it waits for every step."""
        self.step()

    def close(self, slot: Slot) -> None:
        """Removes the slot, finished or not. Idempotent."""
        self.slots = [other for other in self.slots if other is not slot]

    def clear(self) -> None:
        """Removes all slots."""
        self.slots = []
