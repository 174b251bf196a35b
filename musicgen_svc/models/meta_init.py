"""Modules without weights, for weights that come from a file."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_IN_PLACE = {
    "normal_", "uniform_", "kaiming_normal_", "kaiming_uniform_", "xavier_normal_", "xavier_uniform_",
    "erfinv_", "mul_", "add_", "clamp_",  # what trunc_normal_ is made of
}  # fmt: skip
_SHAPES: dict[str, Callable[..., list[int]]] = {
    # Weight norm: the product of direction and gain, and a direction's gain.
    "_weight_norm": lambda tensor, gain, dim: list(tensor.shape),
    "norm_except_dim": lambda tensor, power, dim: [n if d == dim else 1 for d, n in enumerate(tensor.shape)],
}


class _Unfilled(TorchFunctionMode):
    """Leaves out what is about values alone, which a meta tensor does not have."""

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        tensor = args[0] if args else kwargs.get("tensor")  # torch.nn.init passes it by name
        if isinstance(tensor, torch.Tensor) and tensor.is_meta:
            if name in _IN_PLACE:
                return tensor
            if name in _SHAPES and not kwargs:
                return tensor.new_empty(_SHAPES[name](*args))
        return func(*args, **kwargs)


@contextmanager
def on_meta() -> Iterator[None]:
    """Inside, modules are made on the meta device, by their shapes alone.

    `torch.device("meta")` is nearly the same, but initialises tensors that have no values in Python
    functions, for which torch imports its compiler: as long again as all of torch takes.
    """
    with torch.device("meta"), _Unfilled():
        yield
