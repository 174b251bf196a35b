"""What the host does for a step on a GPU: launches, and times that it waits; and the device: kernels."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.autograd import DeviceType

LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpy", "cudaMemset")
COPIES = ("Memcpy", "Memset")
FRAMES = (8, 24)
"""Two lengths whose difference has no beginning, no end and nothing of the profiler's own."""


@dataclass(frozen=True)
class Counts:
    launches: float = 0
    """Of kernels, graphs, copies and fills, by the host. A graph is one."""
    syncs: float = 0
    """Calls that return only when the device is done."""
    kernels: float = 0
    """That ran on the device; those within graphs too."""


def count(events: Iterable[Any]) -> Counts:
    """Of a profiler's events, each with a `name` and a `device_type`."""
    launches = syncs = kernels = 0
    for event in events:
        if event.device_type == DeviceType.CUDA:
            kernels += not event.name.startswith(COPIES)
        else:
            launches += event.name.startswith(LAUNCHES)
            # A copy that is not `Async` waits, too.
            syncs += event.name in ("cudaMemcpy", "cudaMemcpy2D") or (
                event.name.startswith("cu") and event.name.endswith("Synchronize")
            )
    return Counts(launches, syncs, kernels)


def per_step(run: Callable[[int], object]) -> dict[str, float]:
    """Counts of one step of `run(frames)`."""
    short, long = FRAMES
    run(long)  # what is only done once
    less, more = count(profiled(lambda: run(short))), count(profiled(lambda: run(long)))
    return {name: (value - asdict(less)[name]) / (long - short) for name, value in asdict(more).items()}


def profiled(run: Callable[[], object]) -> Iterable[Any]:
    from torch.profiler import profile, supported_activities

    with profile(activities=supported_activities(), acc_events=True) as profiler:  # or it warns
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return profiler.events() or []
