"""CUDA graphs of paper: operations that are run again, with the very tensors that they were recorded with.

As with a real one, recording computes nothing: what stood in memory before stands there after. Whatever
the host knew at that time, a number or how much of a buffer is read, is the same in each replay, and
only what lies in memory can have changed. What a recording makes on its way is worth nothing after a
replay, since others use that memory too; so it is overwritten then.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True, eq=False)
class Call:
    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    made: Mapping[int, Tensor]
    """Of what it returned, that which lies in memory of its own."""

    def repeat(self) -> None:
        returned = tree_leaves(self.function(*self.args, **self.kwargs))
        for index, tensor in self.made.items():
            tensor.copy_(returned[index])


class PaperGraph:
    """What `torch.cuda.CUDAGraph` is. Its tensors are a CPU's."""

    def __init__(self) -> None:
        self.replays = 0
        self._calls: list[Call] = []
        self._made: dict[int, Tensor] = {}  # by address
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def pool(self) -> object:
        return self

    def note(self, function: Any) -> Callable[..., Any]:
        """The same function, whose calls are remembered."""

        def noted(*args: Any, **kwargs: Any) -> Any:
            assert torch.Tag.nondeterministic_seeded not in function.tags, f"{function}: recorded, it repeats"
            given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            writes = function._schema.is_mutable
            if writes:
                for tensor in given:
                    self._keep(tensor)
            result = function(*args, **kwargs)
            known = {address(tensor) for tensor in given}
            made = {
                index: leaf
                for index, leaf in enumerate(tree_leaves(result))
                if isinstance(leaf, Tensor) and address(leaf) not in known
            }
            self._made |= {address(tensor): tensor for tensor in made.values()}
            if made or writes:  # else it is a view, which stays one of the same memory
                self._calls.append(Call(function, args, kwargs, made))
            return result

        return noted

    def end(self) -> None:
        for storage, before in self._before.values():
            storage.copy_(before)
        self._before.clear()

    @torch.inference_mode()
    def replay(self) -> None:
        self.replays += 1
        for call in self._calls:
            call.repeat()
        for tensor in self._made.values():
            tensor.fill_(worthless(tensor.dtype))

    def _keep(self, tensor: Tensor) -> None:
        at = address(tensor)
        if at not in self._made and at not in self._before:
            storage = tensor.untyped_storage()
            self._before[at] = storage, storage.clone()


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def worthless(dtype: torch.dtype) -> float:
    if dtype == torch.bool:
        return True
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max
