"""Counts what one decode step costs on a GPU: launches and waits of the host, kernels of the device."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.autograd import DeviceType

LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpy", "cudaMemset")
COPIES = ("Memcpy", "Memset")
FRAMES = (8, 24)
"""Lengths of two runs, in frames. Prefill, end and the profiler's own work cancel out in their difference."""


@dataclass(frozen=True)
class Counts:
    """Events of one profiled run, or of one step of it."""

    launches: float = 0
    """Kernels, graphs, copies and fills that the host launched. A graph counts once."""
    syncs: float = 0
    """Calls of the host that returned only when the device was done."""
    kernels: float = 0
    """Kernels that ran on the device, those within graphs included."""


def count(events: Iterable[Any]) -> Counts:
    """Counts a profiler's events, each of which has a `name` and a `device_type`."""
    launches = syncs = kernels = 0
    for event in events:
        if event.device_type == DeviceType.CUDA:
            kernels += not event.name.startswith(COPIES)
        else:
            launches += event.name.startswith(LAUNCHES)
            # A copy waits too, unless its name says `Async`.
            syncs += event.name in ("cudaMemcpy", "cudaMemcpy2D") or (
                event.name.startswith("cu") and event.name.endswith("Synchronize")
            )
    return Counts(launches, syncs, kernels)


def per_step(run: Callable[[int], object]) -> dict[str, float]:
    """Counts the events of one step.

    Args:
        run: decodes this many frames.

    Returns:
        dict: the fields of `Counts`, each as a mean over the steps.
    """
    short, long = FRAMES
    run(long)  # warm-up: does what is done only once
    less, more = count(profiled(lambda: run(short))), count(profiled(lambda: run(long)))
    return {name: (value - asdict(less)[name]) / (long - short) for name, value in asdict(more).items()}


def profiled(run: Callable[[], object]) -> Iterable[Any]:
    """Runs a function and returns the profiler's events."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, acc_events=True) as profiler:  # without acc_events it warns
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return profiler.events() or []
