"""Builds modules without weights, and then assigns the weights of a checkpoint to them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from musicgen_svc.checkpoints.tensor_checks import check_finite
from musicgen_svc.errors import WeightsError, first_line

_IN_PLACE = {
    "normal_", "uniform_", "kaiming_normal_", "kaiming_uniform_", "xavier_normal_", "xavier_uniform_",
    "erfinv_", "mul_", "add_", "clamp_",  # trunc_normal_ calls these
}  # fmt: skip
_SHAPES: dict[str, Callable[..., list[int]]] = {
    # Weight norm: the product of direction and gain, and the gain of a direction.
    "_weight_norm": lambda tensor, gain, dim: list(tensor.shape),
    "norm_except_dim": lambda tensor, power, dim: [n if d == dim else 1 for d, n in enumerate(tensor.shape)],
}


class _SkipInitialisation(TorchFunctionMode):
    """Skips the operations that only set values, because a tensor on the meta device has no values."""

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
    """Builds the modules inside the context on the meta device: they have shapes and no values.

    `torch.device("meta")` alone does nearly the same. But it runs the initialisation in Python functions, and
    torch imports its compiler for these: that takes as long as the import of all the rest of torch.
    """
    with torch.device("meta"), _SkipInitialisation():
        yield


@contextmanager
def configuration_errors(origin: str, what: str) -> Iterator[None]:
    """Turns the errors of a library's constructors into a `WeightsError` about the checkpoint.

    Args:
        origin: the checkpoint's format and path, for the message.
        what: the model that the configuration should build, for the message.

    Raises:
        WeightsError: a constructor did not accept the configuration.
    """
    try:
        yield
    except (TypeError, ValueError, AssertionError, RuntimeError, LookupError, ArithmeticError) as exc:
        raise WeightsError(f"{origin} has a configuration that builds no {what}: {first_line(exc)}") from exc


def assign_weights(
    module: nn.Module,
    names: Mapping[str, torch.Tensor],
    state: Mapping[str, torch.Tensor],
    device: torch.device,
    origin: str,
    prefix: str = "",
) -> None:
    """Assigns tensors of a checkpoint to a module on the meta device, without a second copy.

    Args:
        module: a module that was built inside `on_meta`.
        names: those entries of the module's state dict that are to be assigned. Each tensor is converted to
            the type of its entry.
        state: the checkpoint's tensors, by the same names.
        device: where the module will run.
        origin: the checkpoint's format and path, for messages.
        prefix: what the checkpoint has before these names, for messages.

    Raises:
        WeightsError: after the conversion, numbers among the tensors are not finite.
    """
    converted = {name: state[name].to(device, tensor.dtype) for name, tensor in names.items()}
    check_finite(((prefix + name, tensor) for name, tensor in converted.items()), origin)
    module.load_state_dict(converted, strict=False, assign=True)
    for part in module.modules():
        if isinstance(part, nn.RNNBase):
            # Otherwise cuDNN copies the weights into one block, and warns, at every call on a GPU.
            part.flatten_parameters()
