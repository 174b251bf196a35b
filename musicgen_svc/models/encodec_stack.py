"""The parts of a SEANet stack that a piece of a signal passes: convolutions with their context, and an LSTM.

`encodec_pieces.py` decides which pieces there are, and has the unit of all positions.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from musicgen_svc.models.slices import InSlices
from musicgen_svc.runtime.ticks import Tick

_POINTWISE = (nn.ELU, nn.ReLU, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Identity)


class Recent:
    """The frames of a signal that are still needed."""

    def __init__(self, rate: int) -> None:
        """Makes an empty signal. `rate`: time steps per frame."""
        self._rate, self._first = rate, 0
        self._x: Tensor | None = None

    @property
    def end(self) -> int:
        """How many frames of the signal there have been."""
        return self._first + (0 if self._x is None else -(-self._x.shape[-1] // self._rate))

    def append(self, x: Tensor) -> None:
        """Adds [B, C, T] to the end."""
        assert self._x is None or self._x.shape[-1] % self._rate == 0, "an incomplete frame in mid-signal"
        self._x = x if self._x is None else torch.cat([self._x, x], -1)

    def between(self, start: int, stop: int) -> Tensor:
        """Returns the frames [start, stop), or those of them that the signal has."""
        assert self._x is not None and start >= self._first, (start, self._first)
        first, last = ((frame - self._first) * self._rate for frame in (start, stop))
        return self._x[..., first:last].contiguous()

    def forget_before(self, frame: int) -> None:
        """Drops the frames before this one."""
        if self._x is not None and frame > self._first:
            self._x = self._x[..., (frame - self._first) * self._rate :]
            self._first = frame


class Work:
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
        self.skip(1)

    def skip(self, layers: int) -> None:
        """Counts layers as done."""
        self._done += layers
        self._report()

    def _report(self) -> None:
        self._tick(self._done, self._total)


class Convs:
    """Consecutive layers whose outputs depend only on a bounded neighbourhood of the input."""

    def __init__(self, layers: list[nn.Module]) -> None:
        self._layers = layers
        self.count = len(layers)
        reach, step = _reach(layers)
        self.context = math.ceil(reach / step.numerator)
        """How many frames on either side a frame of the output may depend on."""
        self.rate_in, self.rate_out = step.numerator, step.denominator

    def apply(self, x: Recent, start: int, stop: int, work: Work) -> Tensor:
        """Computes the output of the frames [start, stop): [B, C', (stop - start) * rate_out].

        x must have `context` more frames on either side, except where the signal begins or ends.
        """
        first = max(0, start - self.context)
        y = work.through(self._layers, x.between(first, stop + self.context))
        return y[..., (start - first) * self.rate_out : (stop - first) * self.rate_out]


@dataclass(frozen=True)
class StackParts:
    """The parts of a stack that can be divided into pieces."""

    front: Convs
    """The layers before the LSTM; none if there is no LSTM."""
    lstm: nn.Module | None
    back: Convs

    @property
    def lookahead(self) -> int:
        """How many frames of the input after a frame of the output it may depend on."""
        return self.front.context + self.back.context


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


def split_stack(layers: list[nn.Module]) -> StackParts | None:
    """Splits layers into those before the LSTM, the LSTM, and those after it.

    Returns:
        The parts; without an LSTM all layers are those after it. None if the stack must take one pass.
    """
    at = [i for i, layer in enumerate(layers) if hasattr(layer, "lstm")]
    before, after = (layers[: at[0]], layers[at[0] + 1 :]) if at else ([], layers)
    known = (nn.Conv1d, nn.ConvTranspose1d, *_POINTWISE)
    if not all(isinstance(leaf, known) for layer in before + after for leaf in _leaves(layer)):
        return None
    front, back = Convs(before), Convs(after)
    if not at:
        return StackParts(front, None, back)
    lstm: Any = layers[at[0]].lstm
    if not isinstance(lstm, nn.LSTM) or lstm.bidirectional or lstm.batch_first:
        return None
    return StackParts(front, layers[at[0]], back) if front.rate_out == back.rate_in == 1 else None


def run_lstm(layer: Any, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Runs an LSTM layer from a state: [B, C, F] -> [B, C, F] and the new state.

    `layer` is audiocraft's StreamableLSTM or transformers' EncodecLSTM.
    """
    x = x.permute(2, 0, 1)
    y, state = layer.lstm(x, state)
    if getattr(layer, "skip", True):  # transformers' layer always has the skip connection
        y = y + x
    return y.permute(1, 2, 0), state
