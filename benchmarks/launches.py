"""Measures what one decode step costs on a GPU: launches and waits of the host, kernels of the device."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch.autograd import DeviceType

from benchmarks.workload import Workload
from musicgen_svc.engine.batch import Batch, DecodeRequest

LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpy", "cudaMemset")
COPIES = ("Memcpy", "Memset")
FRAMES = (2, 6)
"""Lengths of two runs of audiocraft, in frames. They are short, because the profiler takes a second for a few
of its steps. Prefill, end and the profiler's own work cancel out in their difference."""
STEPS = (4, 16)
"""Lengths of two runs of the engine, in steps."""
WARM_UP_STEPS = 4


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


def per_step(run: Callable[[int], object], lengths: tuple[int, int] = FRAMES) -> dict[str, float]:
    """Counts the events of one step.

    Args:
        run: decodes this many frames or steps.
        lengths: of the two runs that are compared.

    Returns:
        dict: the fields of `Counts`, each as a mean over the steps.
    """
    short, long = lengths
    run(long)  # warm-up: does what is done only once
    less, more = profiled(lambda: run(short)), profiled(lambda: run(long))
    return difference(less, more, long - short)


def difference(less: Iterable[Any], more: Iterable[Any], steps: int) -> dict[str, float]:
    """Counts the events of one step, from the events of two runs of which the second has more steps."""
    few, many = asdict(count(less)), asdict(count(more))
    return {name: (many[name] - few[name]) / steps for name in many}


@dataclass(frozen=True)
class Kernel:
    """All launches of one kernel, or copies of one kind, in some steps."""

    name: str
    per_step: float
    """Launches in a step."""
    us: float
    """Microseconds that a launch adds to the step, as a mean: from the end of all kernels before it, or from
    its own start if that is later, to its end. So kernels that overlap are not counted twice."""
    share: float
    """Of the step's time, from 0 to 1. What is missing to 1 in the sum of all kernels is time in which the
    device computes nothing."""


@dataclass(frozen=True)
class StepProfile:
    """What one step of the engine consists of, while it is profiled."""

    per_step: dict[str, float]
    """The fields of `Counts`."""
    us: float
    """Microseconds from the first kernel's start to the last one's end, for each step."""
    kernels: list[Kernel]
    """The most expensive one first."""


@torch.inference_mode()
def step_profile(work: Workload, batch: Batch, slots: int) -> StepProfile | None:
    """Profiles a few steps at the end of the work's length, where attention reads most.

    The frames before are a prompt of random tokens, which is prefilled.

    Returns:
        StepProfile: None if no kernel was seen, as on a CPU.
    """
    card, codebooks = batch.decoder.card, len(batch.decoder.delays)
    steps = WARM_UP_STEPS + sum(STEPS)
    given = max(work.frames - steps, 1)
    prompt = torch.randint(card, (codebooks, given), generator=torch.Generator().manual_seed(0))
    opened = [
        batch.open(
            DecodeRequest(
                work.given[i], prompt.to(work.device), given + steps, work.sampling, torch.Generator()
            )
        )
        for i in range(slots)
    ]

    def run(steps: int) -> None:
        for _ in range(steps):
            batch.step()

    try:
        run(WARM_UP_STEPS)
        less, more = (profiled(partial(run, steps)) for steps in STEPS)
    finally:
        for slot in opened:
            batch.close(slot)
    us, kernels = kernels_of(more, STEPS[1])
    return StepProfile(difference(less, more, STEPS[1] - STEPS[0]), us, kernels) if kernels else None


def kernels_of(events: Iterable[Any], steps: int) -> tuple[float, list[Kernel]]:
    """Sums a profiler's events on the device by name.

    Args:
        events: each with a `name`, a `device_type` and a `time_range` in microseconds. Those on the device
            must be in one stream.
        steps: how many steps they are of.

    Returns:
        tuple: microseconds of a step, and the kernels, the most expensive first.
    """
    on_device = [event for event in events if event.device_type == DeviceType.CUDA]
    if not on_device:
        return 0.0, []
    on_device.sort(key=lambda event: (event.time_range.start, event.time_range.end))
    first_us = last_us = on_device[0].time_range.start
    added_us: defaultdict[str, list[float]] = defaultdict(list)
    for event in on_device:
        end_us = event.time_range.end
        added_us[event.name].append(max(0.0, end_us - max(last_us, event.time_range.start)))
        last_us = max(last_us, end_us)
    whole_us = last_us - first_us
    kernels = [
        Kernel(name, len(each) / steps, statistics.mean(each), sum(each) / whole_us)
        for name, each in added_us.items()
    ]
    return whole_us / steps, sorted(kernels, key=lambda kernel: kernel.share, reverse=True)


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
