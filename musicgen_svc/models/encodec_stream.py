"""Decodes EnCodec's tokens while they come, in pieces whose lengths are fixed.

`encodec.py` decodes in the same pieces on a CPU, so that both give the same samples to the last bit.
"""

from collections.abc import Callable, Iterator
from itertools import chain, repeat

import torch
from torch import Tensor

from musicgen_svc.models.encodec_pieces import StackStream
from musicgen_svc.models.encodec_stack import Work
from musicgen_svc.runtime.ticks import Check, no_check

PIECE_FRAMES = (15, 25, 50, 100, 200)
"""The pieces in which audio is decoded on a CPU and in a stream, of which the last is repeated: 0.3 s, 0.5 s,
1 s, 2 s, and then 4 s at 50 Hz. The first is short, so that it can be heard early; the others are longer, so
that there are few of them."""


class CodecStream:
    """Decodes tokens while they come: `push` them in order, and `finish` after the last one.

    Together the pieces of samples are those of `Codec.decode` for all the tokens: on a CPU to the last bit,
    elsewhere up to rounding.
    """

    def __init__(self, latents: Callable[[Tensor], Tensor], streams: list[StackStream], at_once: int) -> None:
        """Makes the state of audio that has not begun.

        Args:
            latents: `Codec.latents`.
            streams: for each batch of separately coded signals, the state of its decoder.
            at_once: the signals in a batch.
        """
        self._latents, self._streams, self._at_once = latents, streams, at_once

    @property
    def missing(self) -> int | None:
        """How many tokens must still come before the next piece. None: it comes with `finish`."""
        return self._streams[0].missing

    def push(self, tokens: Tensor, check: Check = no_check) -> Iterator[Tensor]:
        """Takes the next tokens, and yields each piece of samples whose context is then known.

        Args:
            tokens: [K, n], n > 0.
            check: called after each layer of each piece, and on a CPU within long layers.

        Yields:
            [C, m * hop], m > 0.
        """
        with torch.no_grad():
            batches = torch.split(self._latents(tokens), self._at_once)
        work = Work(lambda *_: check(), 1)
        return _joined([stream.push(z, work) for stream, z in zip(self._streams, batches, strict=True)])

    def finish(self, check: Check = no_check) -> Iterator[Tensor]:
        """Yields the pieces that remain when there are no more tokens."""
        work = Work(lambda *_: check(), 1)
        return _joined([stream.finish(work) for stream in self._streams])


def stream_pieces() -> Iterator[int]:
    """Returns the lengths of the pieces of a stream, in frames and without end."""
    return chain(PIECE_FRAMES, repeat(PIECE_FRAMES[-1]))


def _joined(batches: list[Iterator[Tensor]]) -> Iterator[Tensor]:
    """Yields the pieces [R', C / R, T] of all batches joined to pieces [C, T]."""
    while True:
        with torch.no_grad():  # not around a `yield`, which would leave it on in the caller
            pieces = [next(batch, None) for batch in batches]
        present = [piece for piece in pieces if piece is not None]
        if not present:
            return
        assert len(present) == len(batches)
        yield torch.cat(present).flatten(0, 1)
