"""Long layers of audio in slices of bounded work, with the result of the whole to the last bit.

`InSlices` is a context. Inside of it, on this thread alone, PyTorch's one-dimensional convolutions and
LSTMs on a CPU are computed slice by slice along time, ELU, padding and sums piece by piece, and `report`
is called after each of them. A layer over half a minute of audio may take seconds on a CPU, and whoever
shares the device waits for that long otherwise. On a GPU such a layer takes milliseconds, so everything
is left as it is there.

An output of a convolution is the same sum over the same inputs in every slice, and oneDNN adds it up in
the same order as long as slices are large: smaller ones than `SLICE_WORK` may take another algorithm.
An LSTM's slices hand its state on.

On several threads two operations are not sliced, because they would round differently: how oneDNN adds up
a transposed convolution then depends on its length, and ELU's vectorized part on where each thread's share
ends. Nor is what needs all of the signal: norms over time, an LSTM that also runs backwards. `report` is
called after each of them whose result is large. This file does not know of which network an operation is
part.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

SLICE_WORK = 2**30
"""Multiplications of a slice: about 0.05 s of one core."""
ELEMENT_WORK = 64
"""What reading or writing one element costs, in multiplications: narrow layers wait for the memory."""
LARGE = 2**20
"""Elements of a result after which `report` is called, whatever the operation."""
PIECE = 2**21
"""Elements of a piece of what is computed element by element. A multiple of any vector's length."""


class InSlices(TorchFunctionMode):
    """A context in which long operations report as they go on.

    Args:
        report: called often, between two pieces of work; what it raises ends the operation.
    """

    def __init__(self, report: Callable[[], None]) -> None:
        super().__init__()
        self._report = report

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not (args and isinstance(args[0], Tensor) and args[0].device.type == "cpu"):
            return func(*args, **kwargs)
        if torch.is_autocast_enabled("cpu"):  # results would be of another type than what they are made of
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
    """`torch.conv1d` by slices of its output: [B, C, T] -> [B, C', T']."""
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
        first, last = start * step - pad, (stop - 1) * step - pad + reach + 1  # of the input
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
    """`torch.conv_transpose1d` by slices of its output: [B, C, T] -> [B, C', T']."""
    step, pad, gap = _one(stride), _one(padding), _one(dilation)
    if x.ndim != 3 or _one(output_padding) or torch.get_num_threads() > 1:
        return F.conv_transpose1d(x, weight, bias, stride, padding, output_padding, groups, dilation)
    reach, channels = (weight.shape[2] - 1) * gap, weight.shape[1] * groups
    length = (x.shape[2] - 1) * step - 2 * pad + reach + 1
    # Per `step` outputs the work is that of one input.
    work = x.shape[0] * (weight.numel() + ELEMENT_WORK * (x.shape[1] + channels * step))
    edges = [min(length, edge * step) for edge in _edges(-(-length // step), work)]
    if len(edges) <= 2 or reach + 1 < step:  # then some outputs are of no input
        return F.conv_transpose1d(x, weight, bias, stride, padding, output_padding, groups, dilation)
    y = _zeros(report, x, x.shape[0], channels, length)
    for start, stop in itertools.pairwise(edges):
        first = max(0, -(-(start + pad - reach) // step))  # the first and the last input that matter
        last = min(x.shape[2] - 1, (stop - 1 + pad) // step)
        part = F.conv_transpose1d(x[..., first : last + 1], weight, bias, step, 0, 0, groups, gap)
        offset = pad - first * step
        y[..., start:stop] = part[..., start + offset : stop + offset]
        report()
    return y


def _lstm(report: Callable[[], None], x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """`torch.lstm` by slices along time, each of which begins with the state that the one before left."""
    if kwargs or len(args) != 8 or not isinstance(args[1], list | tuple):  # that of packed sequences
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
    """`F.elu` piece by piece: on one thread the remainders lie where they do in the whole."""
    if inplace or not _divisible(x) or torch.get_num_threads() > 1:
        return F.elu(x, alpha, inplace)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for part, result in _pieces(x, y):
        result.copy_(F.elu(part, alpha))
        report()
    return y


def _add(report: Callable[[], None], x: Tensor, other: Any, **options: Any) -> Tensor:
    """`x + other` piece by piece."""
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
    """`F.pad` with zeros along time, row by row."""
    if not _divisible(x) or len(pad) != 2 or min(pad) < 0 or mode != "constant" or value:
        return F.pad(x, pad, mode, value)
    y = _zeros(report, x, *x.shape[:2], pad[0] + x.shape[2] + pad[1])
    for row, result in zip(x.flatten(0, 1), y.flatten(0, 1), strict=True):
        result[pad[0] : pad[0] + x.shape[2]] = row
        report()
    return y


def _zeros(report: Callable[[], None], like: Tensor, *shape: int) -> Tensor:
    """A result to fill. Each page of it is written now: the first slice would do so: it reaches all rows."""
    y = like.new_empty(shape)
    for (part,) in _pieces(y):
        part.zero_()
        report()
    return y


def _divisible(x: Tensor) -> bool:
    """Whether x is audio of many channels or steps that is worth taking apart."""
    return x.numel() > PIECE and x.ndim == 3


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The parts of [B, C, T] tensors of one shape that belong together."""
    if all(x.is_contiguous() for x in tensors):
        return zip(*(torch.split(x.view(-1), PIECE) for x in tensors), strict=True)
    return zip(*(x.unbind(1) for x in tensors), strict=True)


_IN_SLICES: dict[Any, Callable[..., Any]] = {
    F.conv1d: _conv1d, F.conv_transpose1d: _conv_transpose1d, torch.lstm: _lstm,
    F.elu: _elu, F.pad: _pad, torch.add: _add, Tensor.add: _add, Tensor.__add__: _add,
}  # fmt: skip


def _edges(length: int, work: int) -> list[int]:
    """Where to cut `length` steps of `work` multiplications each into about equal slices."""
    slices = max(1, min(length, length * work // SLICE_WORK))
    return [i * length // slices for i in range(slices + 1)]


def _one(value: Any) -> int:
    """PyTorch takes a number or a tuple of one."""
    return int(value[0] if isinstance(value, tuple | list) else value)
