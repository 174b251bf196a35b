"""Launches kernels one after the other, each of which may start before the one in front of it has ended."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from musicgen_svc.engine.chain.tiles import OVERLAPPING
from musicgen_svc.runtime.ticks import Check


def overlaps(device: torch.device) -> bool:
    """Whether launches on a device may overlap."""
    first, end = OVERLAPPING
    return device.type == "cuda" and first <= torch.cuda.get_device_capability(device) < end


class Launches:
    """Launches kernels on a device."""

    def __init__(self, device: torch.device) -> None:
        """Launches kernels on `device`, where `current` must be active."""
        self._device = device
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
        self._use(
            kernel, grid, arguments, constants | options | {"num_warps": warps, "OVERLAP": self._overlap}
        )

    def _use(
        self, kernel: Any, grid: tuple[int, ...], arguments: tuple[object, ...], options: dict[str, Any]
    ) -> None:
        """Launches the kernel with these options."""
        kernel[grid](*arguments, **options)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Context manager that makes the device this thread's current one, on which Triton launches."""
        if self._device.type != "cuda":
            yield
            return
        with torch.cuda.device(self._device):
            yield


class Compilations(Launches):
    """Compiles and loads the kernels that would be launched, and launches nothing."""

    def __init__(self, device: torch.device, check: Check) -> None:
        """`check` is called before each kernel, and may raise to give up."""
        super().__init__(device)
        self._check = check

    def _use(
        self, kernel: Any, grid: tuple[int, ...], arguments: tuple[object, ...], options: dict[str, Any]
    ) -> None:
        """Compiles the kernel for the types of the arguments, and loads it onto the GPU."""
        self._check()
        built = kernel.warmup(*arguments, grid=grid, **options)
        if self._device.type == "cuda":
            _ = built.run  # loads it: without this, a kernel too large for the GPU would be found in a step
