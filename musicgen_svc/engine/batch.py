"""What the engine schedules: requests that are decoded together, one slot each.

There are two kinds of `Batch`, and `factory.py` chooses. In a ragged one (`ragged.py`) each slot owns a
cache of just its length, and the host draws from the request's own generator. That is fast on a CPU, and
equals audiocraft token by token. In a static one (`static.py`) all state lies on the device, which draws
as well, and a step never waits for the host. That is fast on a GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from musicgen_svc.engine.decoder import Conditions, Decoder
from musicgen_svc.engine.delays import deinterleave
from musicgen_svc.engine.sampling_params import SamplingParams
from musicgen_svc.runtime.ticks import Check, no_check

UNKNOWN = -1
"""Marks a token in the columns that is still to be drawn."""


@dataclass(frozen=True, eq=False)
class DecodeRequest:
    """What is to be decoded: tokens that continue a prompt, under conditions."""

    conditions: Conditions
    prompt: Tensor | None  # [K, T0]
    length: int  # frames, the prompt's T0 < length among them
    sampling: SamplingParams
    generator: torch.Generator


@dataclass(eq=False)
class Slot:
    """One request in a batch."""

    columns: Tensor  # [K, S], delayed; UNKNOWN from `filled` on, but for prompt and special tokens
    start: int  # the first column that is drawn
    filled: int  # columns [0, filled) are final
    delays: tuple[int, ...]
    error: Exception | None = field(default=None, init=False)  # that ended it before it was done

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


class Batch(Protocol):
    """Slots that are decoded together. Not safe from several threads: the caller holds the device.

    A slot has the rows of one request (a CFG pair, or one where the second could not matter), its length, its
    generator and its sampling parameters. What a slot generates does not depend on the others, except for
    the last bits of products that a library computes differently for more rows.
    """

    decoder: Decoder
    num_slots: int
    """How many slots may be open at once."""

    @property
    def slots(self) -> Sequence[Slot]:
        """The slots that are open."""

    def has_room(self, request: DecodeRequest) -> bool:
        """Whether the request can be opened beside others.

        If not, it must be opened alone. Safe from any thread.
        """

    def open(self, request: DecodeRequest, check: Check = no_check) -> Slot:
        """Prefills prompt and prefix in one pass, draws the first column, and adds a slot to the others."""

    def step(self) -> None:
        """Computes one more column for every open slot that is not done. May return before the device has."""

    def run(self) -> None:
        """Computes as many steps as there should be between two waits for the device, and waits for them."""

    def close(self, slot: Slot) -> None:
        """Removes the slot, finished or not. Idempotent."""

    def clear(self) -> None:
        """Removes all slots, after a step that failed: what it had written is not known."""
