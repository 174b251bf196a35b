"""A batch in which each slot owns a cache of just its length, and draws on the host from its own generator.

Rows are computed together, attention and draws slot by slot.
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
    cache: RequestCache
    sampling: SamplingParams
    generator: torch.Generator
    logits: Tensor = field(init=False)  # [K, card], guided: what the last column was drawn from

    def take(self, logits: Tensor) -> None:
        """Draws the tokens of the next column from its logits [rows, K, card], where they are not given."""
        self.logits = mix(logits[0], logits[1], self.sampling.guidance) if len(logits) == 2 else logits[0]
        drawn = draw(self.logits, self.sampling, self.generator)
        column = self.columns[:, self.filled]
        self.columns[:, self.filled] = torch.where(column == UNKNOWN, drawn, column)
        self.filled += 1


class RaggedBatch:
    """The batch for a CPU.

    A generator draws on its own device alone, so on a GPU only greedy requests run.
    """

    def __init__(self, decoder: Decoder, num_slots: int) -> None:
        self.decoder = decoder
        self.num_slots = num_slots
        self.slots: list[RaggedSlot] = []

    def has_room(self, request: DecodeRequest) -> bool:
        return True

    @torch.inference_mode()
    def open(self, request: DecodeRequest, check: Check = no_check) -> RaggedSlot:
        begun = prefill(self.decoder, request, spare=True, check=check)
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
        """Computes one step.

        A draw that fails is its slot's own error; a forward that fails can be repeated.
        """
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
            except (
                Exception
            ) as exc:  # for instance a temperature that makes all logits infinite: not the others' fault
                slot.error = exc

    def run(self) -> None:
        """Computes one step: the host draws, and so waits for each."""
        self.step()

    def close(self, slot: Slot) -> None:
        self.slots = [other for other in self.slots if other is not slot]

    def clear(self) -> None:
        self.slots = []
