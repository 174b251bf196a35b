"""Runs a SEANet encoder or decoder over a signal of any length in chunks, with the result of one pass.

EnCodec's encoder and its decoder each consist of convolutions, an LSTM, and convolutions again. A
convolution depends on a bounded neighbourhood, so each chunk is computed with enough context on both sides,
and the outputs that depend on the padding at inner edges are cut off. The LSTM's state continues from chunk
to chunk. This works for the layers of audiocraft and of transformers; a stack with other layers, such as a
norm over time, takes one pass.

Positions are counted in frames, the unit that samples, LSTM and tokens have in common (20 ms in MusicGen's
codec). This module does not know what the signals mean.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from musicgen_svc.models.slices import InSlices
from musicgen_svc.runtime.ticks import Tick, no_tick

_POINTWISE = (nn.ELU, nn.ReLU, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Identity)


class ChunkedStack:
    """The layers of a SEANet encoder or decoder, applied one after the other."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        """`layers`: in their order. Where they have no single forward LSTM, every signal takes one pass."""
        self._layers = list(layers)
        whole = _Convs(self._layers)
        self.rate_in, self.rate_out = whole.rate_in, whole.rate_out
        """Time steps per frame of the input and of the output."""
        self._parts = _parts(self._layers)

    @property
    def context(self) -> int:
        """Frames on either side on which the layers after the LSTM depend; 0 if every signal is one pass."""
        return self._parts[2].context if self._parts else 0

    def run(self, x: Tensor, chunk: int, tick: Tick = no_tick) -> Iterator[Tensor]:
        """Computes the output in pieces of at most `chunk` frames.

        Args:
            x: [B, C, T], T > 0, on the layers' device.
            chunk: frames of the longest piece. A signal that is not longer takes one pass.
            tick: called with the number of finished layers, after each layer of each piece and, on a CPU,
                between the slices of a long layer (see `InSlices`).

        Yields:
            [B, C', n * rate_out], n frames of the output; ceil(T / rate_in) frames in total.
        """
        frames = -(-x.shape[-1] // self.rate_in)
        pieces = -(-frames // chunk) if self._parts else 1
        work = _Work(tick, pieces * len(self._layers))
        if self._parts is None or pieces == 1:  # the same calls as in the network's own forward
            yield work.through(self._layers, x)
            return

        front, lstm, back = self._parts
        # Each piece must be longer than the context, so all pieces have about the same length.
        assert chunk >= 2 * (back.context + 1), (chunk, back.context)
        edges = [i * frames // pieces for i in range(pieces + 1)]
        state: Any = None
        known = 0  # frames that the LSTM has processed
        first = 0  # the first frame of `hidden`
        hidden = x.new_empty(0)  # the LSTM's output: [B, H, known - first]
        for start, stop in itertools.pairwise(edges):
            ahead = min(stop + back.context, frames)
            new = front.apply(x, known, ahead, work)
            with work.layer():
                new, state = _run_lstm(lstm, new, state)
            hidden = torch.cat([hidden, new], -1) if known else new
            known = ahead
            y = back.apply(hidden, start - first, stop - first, work)
            if y.is_cuda:  # else the host would enqueue all pieces, and could no longer stop
                torch.cuda.synchronize(y.device)
            yield y
            keep = max(0, stop - back.context)
            hidden, first = hidden[..., keep - first :], keep


class _Work:
    """Runs layers, counts them and reports the count."""

    def __init__(self, tick: Tick, total: int) -> None:
        self._tick, self._done, self._total = tick, 0, total

    def through(self, layers: list[nn.Module], x: Tensor) -> Tensor:
        """Applies layers one after the other: [B, C, T] -> [B, C', T']."""
        for layer in layers:
            with self.layer():
                x = layer(x)
        return x

    @contextmanager
    def layer(self) -> Iterator[None]:
        """Context manager around the computation of one layer."""
        with InSlices(self._report):
            yield
        self._done += 1
        self._report()

    def _report(self) -> None:
        self._tick(self._done, self._total)


class _Convs:
    """Consecutive layers whose outputs depend only on a bounded neighbourhood of the input."""

    def __init__(self, layers: list[nn.Module]) -> None:
        self._layers = layers
        reach, step = _reach(layers)
        self.context = math.ceil(reach / step.numerator)
        """How many frames on either side a frame of the output may depend on."""
        self.rate_in, self.rate_out = step.numerator, step.denominator

    def apply(self, x: Tensor, start: int, stop: int, work: _Work) -> Tensor:
        """Computes the output of the frames [start, stop): [B, C, T] -> [B, C', (stop - start) * rate_out].

        x must include `context` more frames on either side, except where the signal begins or ends.
        """
        first = max(0, start - self.context)
        x = x[..., first * self.rate_in : (stop + self.context) * self.rate_in]
        x = work.through(self._layers, x)
        return x[..., (start - first) * self.rate_out : (stop - first) * self.rate_out]


def _reach(layers: Iterable[nn.Module]) -> tuple[Fraction, Fraction]:
    """Returns the receptive field on either side, and the distance between two outputs, in input steps.

    This is the recursion over kernels and strides of Araujo et al., "Computing Receptive Fields of
    Convolutional Neural Networks" (Distill, 2019). It ignores how each layer is padded, and counts parallel
    branches as if they were consecutive; both can only make the result larger than necessary.
    """
    reach, step = Fraction(0), Fraction(1)
    for layer in layers:
        for leaf in _leaves(layer):
            if isinstance(leaf, nn.ConvTranspose1d):
                step /= leaf.stride[0]
            if isinstance(leaf, (nn.Conv1d, nn.ConvTranspose1d)):
                reach += (leaf.kernel_size[0] - 1) * leaf.dilation[0] * step
            if isinstance(leaf, nn.Conv1d):
                step *= leaf.stride[0]
    return reach, step


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    """Yields the modules that compute. A convolution counts as one: its children only make its weight."""
    children = [] if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)) else list(module.children())
    if not children:
        yield module
    for child in children:
        yield from _leaves(child)


def _parts(layers: list[nn.Module]) -> tuple[_Convs, nn.Module, _Convs] | None:
    """Splits layers into those before the LSTM, the LSTM, and those after it; None if that is impossible."""
    at = [i for i, layer in enumerate(layers) if hasattr(layer, "lstm")]
    lstm: Any = layers[at[0]].lstm if len(at) == 1 else None
    if not isinstance(lstm, nn.LSTM) or lstm.bidirectional or lstm.batch_first:
        return None
    before, after = layers[: at[0]], layers[at[0] + 1 :]
    known = (nn.Conv1d, nn.ConvTranspose1d, *_POINTWISE)
    if not all(isinstance(leaf, known) for layer in before + after for leaf in _leaves(layer)):
        return None
    front, back = _Convs(before), _Convs(after)
    return (front, layers[at[0]], back) if front.rate_out == back.rate_in == 1 else None


def _run_lstm(layer: Any, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Runs an LSTM layer from a state: [B, C, F] -> [B, C, F] and the new state.

    `layer` is audiocraft's StreamableLSTM or transformers' EncodecLSTM.
    """
    x = x.permute(2, 0, 1)
    y, state = layer.lstm(x, state)
    if getattr(layer, "skip", True):  # transformers' layer always has the skip connection
        y = y + x
    return y.permute(1, 2, 0), state
