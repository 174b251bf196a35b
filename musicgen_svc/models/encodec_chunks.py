"""A SEANet stack over a signal of any length: chunk by chunk, with the result of one pass.

EnCodec's encoder and decoder are each convolutions, an LSTM, convolutions. A convolution sees a
bounded neighbourhood: each chunk is computed with enough of its neighbours around it, and what the
padding at inner edges touched is cut off again. The LSTM runs on from chunk to chunk. audiocraft's
and transformers' layers are understood alike; a stack that is not, such as one with a norm over
time, takes one pass.

Positions are counted in frames, the unit that samples, LSTM and tokens share (20 ms in MusicGen's
codec). This file does not know what its signals mean.
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
    """The layers of a SEANet encoder or decoder; one after the other they are the whole network."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self._layers = list(layers)
        whole = _Convs(self._layers)
        self.rate_in, self.rate_out = whole.rate_in, whole.rate_out
        """Steps per frame on the way in and on the way out."""
        self._parts = _parts(self._layers)

    @property
    def cuttable(self) -> bool:
        """If not, every signal takes one pass, whatever the chunk."""
        return self._parts is not None

    @property
    def context(self) -> int:
        """Frames to either side of a piece that the layers after the LSTM look at; 0 if it is not cut."""
        return self._parts[2].context if self._parts else 0

    def run(self, x: Tensor, chunk: int, tick: Tick = no_tick) -> Iterator[Tensor]:
        """Yields the output in pieces of at most `chunk` frames; a signal no longer than that is one pass.

        Args:
            x: [B, C, T], T > 0, where the layers are.
            tick: called with the number of finished layers, after each of them in each piece and, on a CPU,
                between the slices of a long one (see `InSlices`).

        Yields:
            [B, C', n * rate_out]; together ceil(T / rate_in) frames.
        """
        frames = -(-x.shape[-1] // self.rate_in)
        pieces = -(-frames // chunk) if self._parts else 1
        work = _Work(tick, pieces * len(self._layers))
        if self._parts is None or pieces == 1:  # the very calls of the network's own forward
            yield work.through(self._layers, x)
            return

        front, lstm, back = self._parts
        # Each piece must reach beyond the context of the one before; so they are of equal size, none tiny.
        assert chunk >= 2 * (back.context + 1), (chunk, back.context)
        edges = [i * frames // pieces for i in range(pieces + 1)]
        state: Any = None
        known = 0  # frames that the LSTM has seen
        first = 0  # the frame that `hidden` begins with
        hidden = x.new_empty(0)  # the LSTM's output: [B, H, known - first]
        for start, stop in itertools.pairwise(edges):
            ahead = min(stop + back.context, frames)
            seen = front.apply(x, known, ahead, work)
            with work.layer():
                fresh, state = _remember(lstm, seen, state)
            hidden = torch.cat([hidden, fresh], -1) if known else fresh
            known = ahead
            y = back.apply(hidden, start - first, stop - first, work)
            if y.is_cuda:  # the host must not run ahead: a stop would wait for all that is queued
                torch.cuda.synchronize(y.device)
            yield y
            keep = max(0, stop - back.context)
            hidden, first = hidden[..., keep - first :], keep


class _Work:
    """Runs layers and counts them: `done` of `total`."""

    def __init__(self, tick: Tick, total: int) -> None:
        self._tick, self._done, self._total = tick, 0, total

    def through(self, layers: list[nn.Module], x: Tensor) -> Tensor:
        """x after one layer after the other."""
        for layer in layers:
            with self.layer():
                x = layer(x)
        return x

    @contextmanager
    def layer(self) -> Iterator[None]:
        """What is computed inside is one layer."""
        with InSlices(self._report):
            yield
        self._done += 1
        self._report()

    def _report(self) -> None:
        self._tick(self._done, self._total)


class _Convs:
    """Consecutive layers whose every output depends on a bounded neighbourhood of the input."""

    def __init__(self, layers: list[nn.Module]) -> None:
        self._layers = layers
        reach, step = _reach(layers)
        self.context = math.ceil(reach / step.numerator)
        """Frames to either side that a frame's output may depend on."""
        self.rate_in, self.rate_out = step.numerator, step.denominator

    def apply(self, x: Tensor, start: int, stop: int, work: _Work) -> Tensor:
        """The output of frames `start` to `stop` of x: [B, C, T] -> [B, C', (stop - start) * rate_out].

        x holds `context` frames more on either side, except where the signal begins or ends.
        """
        first = max(0, start - self.context)
        x = x[..., first * self.rate_in : (stop + self.context) * self.rate_in]
        x = work.through(self._layers, x)
        return x[..., (start - first) * self.rate_out : (stop - first) * self.rate_out]


def _reach(layers: Iterable[nn.Module]) -> tuple[Fraction, Fraction]:
    """How far to either side an output looks at most, and how far apart outputs lie, in input steps.

    The recursion over kernels and strides of Araujo et al., "Computing Receptive Fields of
    Convolutional Neural Networks" (Distill, 2019). Where each layer's padding puts its kernel is
    left open, and branches count as if in a row: both can only widen the reach.
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
    """The modules that compute; a convolution's children only make its weight."""
    children = [] if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)) else list(module.children())
    if not children:
        yield module
    for child in children:
        yield from _leaves(child)


def _parts(layers: list[nn.Module]) -> tuple[_Convs, nn.Module, _Convs] | None:
    """The layers before the LSTM, the LSTM, those after it; None if that is not what they are."""
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


def _remember(layer: Any, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    """audiocraft's StreamableLSTM or transformers' EncodecLSTM, with its state: [B, C, F] -> [B, C, F]."""
    x = x.permute(2, 0, 1)
    y, state = layer.lstm(x, state)
    if getattr(layer, "skip", True):  # transformers' always skips
        y = y + x
    return y.permute(1, 2, 0), state
