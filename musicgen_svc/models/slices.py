"""Computes long audio layers on a CPU in slices of bounded work, with the same result to the last bit.

Inside the context manager `InSlices`, and only on its thread, PyTorch computes one-dimensional convolutions
and LSTMs in slices along time, and ELU, padding and sums in pieces. A callback is called after each slice
and piece. Without it, a layer over half a minute of audio could take seconds, and other requests would have
to wait for it. On a GPU such a layer takes milliseconds, so nothing is changed there.

Why the result is the same: in every slice an output of a convolution is the same sum over the same inputs,
and oneDNN adds it up in the same order as long as the slices are large. With less work than `SLICE_WORK` it
may choose another algorithm. The slices of an LSTM pass on its state.

What is not sliced:

- With several threads, transposed convolutions and ELU, because they would round differently: oneDNN's order
  of summation in a transposed convolution then depends on its length, and which elements ELU computes with
  vector instructions depends on how the threads divide the work.
- Operations that need the whole signal: norms over time, and LSTMs that also run backwards.

After each operation that is not sliced the callback is called once, if the result is large. This module does
not know which network an operation belongs to.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

SLICE_WORK = 2**30
"""The work of a slice in multiplications: about 0.05 s on one core."""
ELEMENT_WORK = 64
"""The cost of reading or writing one element, in multiplications. It matters in layers of few channels."""
LARGE = 2**20
"""After an operation whose result has this many elements or more, the callback is called in any case."""
PIECE = 2**21
"""Elements of a piece of an elementwise operation. A multiple of the length of any vector instruction."""


class InSlices(TorchFunctionMode):
    """Context manager in which long operations on a CPU are sliced and call a callback between the slices."""

    def __init__(self, report: Callable[[], None]) -> None:
        """`report`: the callback, called between two slices; if it raises, the operation ends."""
        super().__init__()
        self._report = report

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Computes an operation of PyTorch, in slices if there is a sliced version of it."""
        kwargs = kwargs or {}
        if not (args and isinstance(args[0], Tensor) and args[0].device.type == "cpu"):
            return func(*args, **kwargs)
        if torch.is_autocast_enabled("cpu"):  # results have another dtype than their inputs
            return func(*args, **kwargs)
        in_slices = _IN_SLICES.get(func)
        result = in_slices(self._report, *args, **kwargs) if in_slices else func(*args, **kwargs)
        if isinstance(result, Tensor) and result.numel() >= LARGE:
            self._report()
        return result


def _conv1d(
    report: Callable[[], None], x: Tensor, weight: Tensor, bias: Tensor | None = None,
    stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> Tensor:  # fmt: skip
    """Computes `torch.conv1d` in slices of its output: [B, C, T] -> [B, C', T']."""
    step, gap = _one(stride), _one(dilation)
    if x.ndim != 3 or isinstance(padding, str):
        return F.conv1d(x, weight, bias, stride, padding, dilation, groups)
    pad, reach = _one(padding), (weight.shape[2] - 1) * gap
    length = (x.shape[2] + 2 * pad - reach - 1) // step + 1
    work = x.shape[0] * (weight.numel() + ELEMENT_WORK * (weight.shape[0] + x.shape[1] * step))
    edges = _edges(length, work)
    if len(edges) <= 2:
        return F.conv1d(x, weight, bias, stride, padding, dilation, groups)
    y = _zeros(report, x, x.shape[0], weight.shape[0], length)
    for start, stop in itertools.pairwise(edges):
        first, last = start * step - pad, (stop - 1) * step - pad + reach + 1  # input steps
        part = x[..., max(0, first) : last]
        if first < 0 or last > x.shape[2]:
            part = F.pad(part, (max(0, -first), max(0, last - x.shape[2])))
        y[..., start:stop] = F.conv1d(part, weight, bias, step, 0, gap, groups)
        report()
    return y


def _conv_transpose1d(
    report: Callable[[], None], x: Tensor, weight: Tensor, bias: Tensor | None = None,
    stride: Any = 1, padding: Any = 0, output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Tensor:  # fmt: skip
    """Computes `torch.conv_transpose1d` in slices of its output: [B, C, T] -> [B, C', T']."""
    step, pad, gap = _one(stride), _one(padding), _one(dilation)
    if x.ndim != 3 or _one(output_padding) or torch.get_num_threads() > 1:
        return F.conv_transpose1d(x, weight, bias, stride, padding, output_padding, groups, dilation)
    reach, channels = (weight.shape[2] - 1) * gap, weight.shape[1] * groups
    length = (x.shape[2] - 1) * step - 2 * pad + reach + 1
    # The unit of work is one input step, which makes `step` output steps.
    work = x.shape[0] * (weight.numel() + ELEMENT_WORK * (x.shape[1] + channels * step))
    edges = [min(length, edge * step) for edge in _edges(-(-length // step), work)]
    if len(edges) <= 2 or reach + 1 < step:  # some outputs depend on no input
        return F.conv_transpose1d(x, weight, bias, stride, padding, output_padding, groups, dilation)
    y = _zeros(report, x, x.shape[0], channels, length)
    for start, stop in itertools.pairwise(edges):
        first = max(0, -(-(start + pad - reach) // step))  # the first and last input step of the slice
        last = min(x.shape[2] - 1, (stop - 1 + pad) // step)
        part = F.conv_transpose1d(x[..., first : last + 1], weight, bias, step, 0, 0, groups, gap)
        offset = pad - first * step
        y[..., start:stop] = part[..., start + offset : stop + offset]
        report()
    return y


def _lstm(report: Callable[[], None], x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Computes `torch.lstm` in slices along time. Each begins with the state that the previous one left."""
    if kwargs or len(args) != 8 or not isinstance(args[1], list | tuple):  # the variant for packed sequences
        return torch.lstm(x, *args, **kwargs)
    state, weights, biased, layers, dropout, training, both_ways, batch_first = args
    time = 1 if batch_first else 0
    edges = _edges(x.shape[time], x.shape[1 - time] * sum(weight.numel() for weight in weights))
    if both_ways or len(edges) <= 2:
        return torch.lstm(x, *args)
    outputs = []
    for start, stop in itertools.pairwise(edges):
        part = x.narrow(time, start, stop - start)
        y, *state = torch.lstm(
            part, state, weights, biased, layers, dropout, training, both_ways, batch_first
        )
        outputs.append(y)
        report()
    return torch.cat(outputs, time), *state


def _elu(report: Callable[[], None], x: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """Computes `F.elu` in pieces.

    On one thread, the elements that remain after the vector instructions are the same as without pieces.
    """
    if inplace or not _divisible(x) or torch.get_num_threads() > 1:
        return F.elu(x, alpha, inplace)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for part, result in _pieces(x, y):
        result.copy_(F.elu(part, alpha))
        report()
    return y


def _add(report: Callable[[], None], x: Tensor, other: Any, **options: Any) -> Tensor:
    """Computes `x + other` in pieces."""
    alike = isinstance(other, Tensor) and (other.shape, other.dtype) == (x.shape, x.dtype)
    if options or not alike or not _divisible(x):
        return torch.add(x, other, **options)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for first, second, result in _pieces(x, other, y):
        torch.add(first, second, out=result)
        report()
    return y


def _pad(
    report: Callable[[], None], x: Tensor, pad: Any, mode: str = "constant", value: float | None = None
) -> Tensor:
    """Computes `F.pad` with zeros along time, row by row."""
    if not _divisible(x) or len(pad) != 2 or min(pad) < 0 or mode != "constant" or value:
        return F.pad(x, pad, mode, value)
    y = _zeros(report, x, *x.shape[:2], pad[0] + x.shape[2] + pad[1])
    for row, result in zip(x.flatten(0, 1), y.flatten(0, 1), strict=True):
        result[pad[0] : pad[0] + x.shape[2]] = row
        report()
    return y


def _zeros(report: Callable[[], None], like: Tensor, *shape: int) -> Tensor:
    """Returns a zero tensor like `like`, for a result.

    Writing it in pieces makes the system provide its memory in pieces too. Otherwise the first slice, which
    writes to every row, would have to wait for all of it.
    """
    y = like.new_empty(shape)
    for (part,) in _pieces(y):
        part.zero_()
        report()
    return y


def _divisible(x: Tensor) -> bool:
    """Tells whether x is a signal [B, C, T] that is large enough for pieces."""
    return x.numel() > PIECE and x.ndim == 3


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yields corresponding pieces of tensors [B, C, T] of the same shape."""
    if all(x.is_contiguous() for x in tensors):
        return zip(*(torch.split(x.view(-1), PIECE) for x in tensors), strict=True)
    return zip(*(x.unbind(1) for x in tensors), strict=True)


_IN_SLICES: dict[Any, Callable[..., Any]] = {
    F.conv1d: _conv1d, F.conv_transpose1d: _conv_transpose1d, torch.lstm: _lstm,
    F.elu: _elu, F.pad: _pad, torch.add: _add, Tensor.add: _add, Tensor.__add__: _add,
}  # fmt: skip


def _edges(length: int, work: int) -> list[int]:
    """Returns the edges of about equal slices of `length` steps, of `work` multiplications each."""
    slices = max(1, min(length, length * work // SLICE_WORK))
    return [i * length // slices for i in range(slices + 1)]


def _one(value: Any) -> int:
    """Returns the number in an argument that is a number or a tuple of one."""
    return int(value[0] if isinstance(value, tuple | list) else value)
