"""What the engine schedules: requests that decode together, whoever keeps their state and wherever.

There are two kinds of `Batch`, and `factory.py` chooses. In a ragged one (`ragged.py`) each slot owns a
cache of just its length, and the host draws from the request's own generator: what a CPU wants, and what
equals audiocraft token by token. In a static one (`static.py`) all state lies on the device, which draws
as well, and a step never asks the host: what a GPU wants.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from musicgen_svc.engine.decoder import Conditions, Decoder, Pulse
from musicgen_svc.engine.delays import deinterleave
from musicgen_svc.request import SamplingParams

UNKNOWN = -1
"""Stands in the columns where a token is still to be drawn."""


@dataclass(frozen=True, eq=False)
class DecodeRequest:
    """What is to be decoded: tokens that go on from a prompt, under conditions."""

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
    """Not safe from several threads: whoever calls holds the device, but for `has_room`.

    A slot is one request: its rows (a CFG pair, or one where the second could not matter), its length,
    its generator and its sampling parameters. What a slot generates does not depend on the others, but
    for the last bits of products that a library computes otherwise for more rows.
    """

    decoder: Decoder
    places: int
    """How many slots may be open at once."""

    @property
    def slots(self) -> Sequence[Slot]:
        """Those that are open."""

    def has_room(self, request: DecodeRequest) -> bool:
        """Whether it can be opened beside others. If not, then only while no other slot is open."""

    def open(self, request: DecodeRequest, pulse: Pulse = lambda: None) -> Slot:
        """Prefills prompt and prefix in one pass, draws the first column, and joins the others."""

    def step(self) -> None:
        """One more column for every open slot that is not done; perhaps not awaited."""

    def run(self) -> None:
        """As many steps as there should be between two looks of the host at the device; awaited."""

    def close(self, slot: Slot) -> None:
        """Leaves, done or not; twice is once."""

    def clear(self) -> None:
        """All leave, after a step that failed: what it had written is not known."""
