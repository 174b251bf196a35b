"""Launches kernels one after the other, each of which may start before the one in front of it has ended."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from musicgen_svc.engine.chain.tiles import OVERLAPPING


def overlaps(device: torch.device) -> bool:
    """Whether launches on a device may overlap: GPUs of compute capability 9.0 and later can do it."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= OVERLAPPING


class Launches:
    """Launches kernels on a device, or only compiles them."""

    def __init__(self, device: torch.device, *, compile_only: bool = False) -> None:
        """`compile_only`: nothing is launched; the kernels are compiled for the arguments that they get."""
        self._device = device
        self._compile_only = compile_only
        self._overlap = overlaps(device)

    def __call__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        *arguments: object,
        warps: int,
        first: bool = False,
        **constants: object,
    ) -> None:
        """Launches a kernel.

        Args:
            kernel: the Triton function.
            grid: the number of programs along each axis.
            arguments: its first parameters.
            warps: how many warps a program has.
            first: the kernel starts only when all earlier work has ended. Else it may start at once, and must
                wait itself.
            constants: its other parameters, without OVERLAP.
        """
        options: dict[str, Any] = {"launch_pdl": True} if self._overlap and not first else {}
        options |= {"num_warps": warps, "OVERLAP": self._overlap}
        if self._compile_only:
            kernel.warmup(*arguments, grid=grid, **constants, **options)
        else:
            kernel[grid](*arguments, **constants, **options)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Context manager that makes the device this thread's current one, on which Triton launches."""
        if self._device.type != "cuda":
            yield
            return
        with torch.cuda.device(self._device):
            yield
