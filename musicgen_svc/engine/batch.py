"""The protocol of a batch: requests that are decoded together, each in a slot.

There are two implementations, and `factory.py` chooses one. In a ragged batch (`ragged.py`) each slot owns a
cache of exactly its length, and the host draws tokens from the request's own generator. This is fast on a
CPU, and gives audiocraft's tokens exactly. In a static batch (`static.py`) the device holds all state and
draws the tokens, and a step never waits for the host. This is fast on a GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from musicgen_svc.engine.decoder import Conditions, Decoder
from musicgen_svc.engine.delays import deinterleave, num_columns
from musicgen_svc.engine.sampling_params import SamplingParams
from musicgen_svc.runtime.ticks import Check, no_check

UNKNOWN = -1
"""Marks a token in the columns that has not been drawn yet."""


@dataclass(frozen=True, eq=False)
class DecodeRequest:
    """A request to decode tokens that continue a prompt, under conditions."""

    conditions: Conditions
    prompt: Tensor | None  # [K, T0]
    length: int  # frames in total; the prompt's T0 < length frames are included
    sampling: SamplingParams
    generator: torch.Generator


@dataclass(eq=False)
class Slot:
    """One request in a batch, and how far it has been decoded."""

    columns: Tensor  # [K, S], delayed; UNKNOWN from `filled` on, except prompt and special tokens
    start: int  # the first column to draw
    filled: int  # columns [0, filled) are final
    delays: tuple[int, ...]
    error: Exception | None = field(default=None, init=False)  # what ended the request before it was done

    @property
    def done(self) -> bool:
        """Whether all columns are final."""
        return self.filled == self.columns.shape[1]

    @property
    def running(self) -> bool:
        """Whether the next step computes a column for this slot."""
        return not self.done and self.error is None

    @property
    def progress(self) -> tuple[int, int]:
        """(done, total): how many of the columns to draw have been drawn, and how many there are."""
        return self.filled - self.start, self.columns.shape[1] - self.start

    @property
    def codes(self) -> Tensor:
        """[K, length] tokens. Only available when the slot is done."""
        assert self.done
        return deinterleave(self.columns, self.delays).clone()

    def final_frames(self, start: int) -> Tensor:
        """Returns the frames from `start` on whose codebooks are all drawn, on the host: [K, n], n >= 0.

        The caller must hold the device, because the columns may be on it.
        """
        # The columns from `start` on look like those of a request that begins at this frame. At least as many
        # are taken as no frame needs.
        stop = max(self.filled, start + num_columns(0, self.delays))
        return deinterleave(self.columns[:, start:stop], self.delays).cpu()


class Batch(Protocol):
    """Slots that are decoded together. Not thread-safe: the caller must hold the device.

    A slot has the rows of one request (conditional and null, or one row if both would give the same), its
    length, its generator and its sampling parameters. The tokens of a slot do not depend on the other slots,
    except for rounding: a library may compute a product differently for another number of rows.
    """

    decoder: Decoder
    num_slots: int
    """How many slots can be open at once."""

    @property
    def slots(self) -> Sequence[Slot]:
        """The slots that are open."""

    def has_room(self, request: DecodeRequest) -> bool:
        """Whether the request can be opened while other slots are open.

        If not, it must be opened when no slot is open. Thread-safe.
        """

    def prepare(self, slots: int, check: Check = no_check) -> None:
        """Compiles what steps of up to this many slots need, unless it has been done. It may take seconds.

        Thread-safe: the caller need not hold the device, so that other slots are stepped meanwhile. `check`
        is called now and then, and may raise to give up.
        """

    def open(self, request: DecodeRequest, check: Check = no_check) -> Slot:
        """Prefills the prefix and the prompt in one pass, draws the first column and adds the slot.

        `check` is called during the prefill, and may raise to end the request.
        """

    def step(self) -> None:
        """Computes one more column for every running slot. May return before the device has computed it."""

    def run(self) -> None:
        """Computes one or more steps, and waits until the device has computed them."""

    def close(self, slot: Slot) -> None:
        """Removes the slot, finished or not. Idempotent."""

    def clear(self) -> None:
        """Removes all slots, after a step that failed: it is not known what the step had written."""
