"""Runs a SEANet encoder or decoder over a signal of any length in pieces, as the signal comes.

A piece is a number of consecutive frames of the output, which are computed together.

EnCodec's encoder and its decoder each consist of convolutions, an LSTM, and convolutions again; some have no
LSTM. A convolution depends on a bounded neighbourhood, so each piece is computed with enough context on both
sides, and the outputs that depend on the padding at inner edges are cut off. The LSTM's state continues from
piece to piece. This works for the layers of audiocraft and of transformers; a stack with other layers, such
as a norm over time, takes one pass over the whole signal.

A piece is computed from the same tensors whether the signal comes at once or bit by bit. So on a CPU the
pieces of both have the same bits, if both have the same lengths. With other lengths they are equal up to
rounding only, because oneDNN chooses its order of summation by the length of a signal.

Positions are counted in frames, the unit that samples, LSTM and tokens have in common (20 ms in MusicGen's
codec). This module does not know what the signals mean.
The parts of a stack are in `encodec_stack.py`: the layers before the LSTM, the LSTM, and those after it.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from musicgen_svc.models.encodec_stack import Convs, Recent, StackParts, Work, run_lstm, split_stack
from musicgen_svc.runtime.ticks import Tick, no_tick


class PiecewiseStack:
    """The layers of a SEANet encoder or decoder, applied one after the other."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        """`layers`: in their order. A stack that cannot be divided into pieces takes one pass."""
        self._layers = list(layers)
        whole = Convs(self._layers)
        self.rate_in, self.rate_out = whole.rate_in, whole.rate_out
        """Time steps per frame of the input and of the output."""
        self._parts = split_stack(self._layers)

    @property
    def context(self) -> int:
        """Frames on either side on which the layers after the LSTM depend; 0 if every signal is one pass."""
        return self._parts.back.context if self._parts else 0

    def stream(self, lengths: Iterable[int]) -> "StackStream":
        """Returns the state of a new signal, whose output has pieces of these lengths in frames."""
        return StackStream(self._layers, self._parts, self.rate_in, lengths)

    def run(self, x: Tensor, lengths: Iterable[int], tick: Tick = no_tick) -> Iterator[Tensor]:
        """Computes the output of a whole signal. It is the same as that of its stream.

        Args:
            x: [B, C, T], T > 0, on the layers' device.
            lengths: frames of each piece; at least ceil(T / rate_in) in total. What exceeds that is not used.
            tick: called with the number of finished layers, after each layer of each piece and, on a CPU,
                between the slices of a long layer (see `InSlices`).

        Yields:
            [B, C', n * rate_out], n frames of the output; ceil(T / rate_in) frames in total.
        """
        pieces = _up_to(-(-x.shape[-1] // self.rate_in), lengths) if self._parts else [0]
        work = Work(tick, len(pieces) * len(self._layers))
        stream = self.stream(pieces)
        yield from stream.push(x, work)
        yield from stream.finish(work)


class StackStream:
    """A signal that passes a stack while it comes: `push` its frames in order, and at its end `finish`."""

    def __init__(
        self, layers: list[nn.Module], parts: StackParts | None, rate_in: int, lengths: Iterable[int]
    ) -> None:
        """Makes the state of a signal that has not begun. `PiecewiseStack.stream` knows the arguments."""
        self._layers, self._parts, self._lengths = layers, parts, iter(lengths)
        self._input = Recent(rate_in)
        # The input of the layers after the LSTM; without an LSTM the input of the stack.
        self._hidden = Recent(1) if parts is not None and parts.lstm is not None else self._input
        self._state: Any = None
        self._start = 0
        self._stop = next(self._lengths) if parts is not None else 0

    @property
    def missing(self) -> int | None:
        """How many frames must still come before the next piece. None: no piece comes before `finish`."""
        if self._parts is None:
            return None
        return self._stop + self._parts.lookahead - self._input.end

    def push(self, x: Tensor, work: Work) -> Iterator[Tensor]:
        """Takes the next frames of the signal, and yields each piece whose context is then known.

        Args:
            x: [B, C, T], T > 0; whole frames unless the signal ends with it.
            work: runs the layers.

        Yields:
            [B, C', n * rate_out], as `PiecewiseStack.run`.
        """
        self._input.append(x)
        parts = self._parts
        while parts is not None and self._start < self._stop <= self._input.end - parts.lookahead:
            yield self._piece(parts, work)

    def finish(self, work: Work) -> Iterator[Tensor]:
        """Yields the pieces that remain when the signal has ended."""
        end = self._input.end
        if self._parts is None:
            yield work.through(self._layers, self._input.between(0, end))
            return
        while self._start < end:
            self._stop = min(self._stop, end)
            yield self._piece(self._parts, work)

    def _piece(self, parts: StackParts, work: Work) -> Tensor:
        """Computes the frames [start, stop) of the output, and moves on to the next piece."""
        ahead = min(self._stop + parts.back.context, self._input.end)
        if parts.lstm is not None and ahead > self._hidden.end:
            x = parts.front.apply(self._input, self._hidden.end, ahead, work)
            with work.layer():
                x, self._state = run_lstm(parts.lstm, x, self._state)
            self._hidden.append(x)
            self._input.forget_before(ahead - parts.front.context)
        elif parts.lstm is not None:
            work.skip(parts.front.count + 1)
        y = parts.back.apply(self._hidden, self._start, self._stop, work)
        whole = self._stop - self._start == self._input.end
        if y.is_cuda and not whole:  # without this wait the host would enqueue all pieces, and could not stop
            torch.cuda.synchronize(y.device)
        self._hidden.forget_before(self._stop - parts.back.context)
        self._start = self._stop
        self._stop += next(self._lengths, 0)
        return y


def _up_to(frames: int, lengths: Iterable[int]) -> list[int]:
    """Returns the first lengths, of which the last is cut, so that they are `frames` in total."""
    taken: list[int] = []
    for length in lengths:
        taken.append(min(length, frames))
        frames -= taken[-1]
        if frames == 0:
            break
    return taken
