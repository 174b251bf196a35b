"""How much memory there is to keep models in."""

import os
from pathlib import Path

import torch

GB = 10**9
WORKING_SPACE_CPU = 4 * GB
"""Besides the weights: Python and its libraries, what a request computes with, its keys and values."""
WORKING_SPACE_GPU = 2 * GB
"""Besides the weights and the engine's own buffers: what a request computes with."""


def budget(device: torch.device, gigabytes: float) -> int:
    """Bytes for models: so many gigabytes or, for 0, what the device has less working space.

    On a device with little memory a quarter of it must do as working space.
    """
    if gigabytes:
        return round(gigabytes * GB)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free - min(free // 4, WORKING_SPACE_GPU)
    there_is = min(filter(None, (physical(), container_limit())))
    return there_is - min(there_is // 4, WORKING_SPACE_CPU)


def physical() -> int:
    """The machine's memory, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def container_limit(
    groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> int | None:
    """What this process's control group, or one around it, may use, in bytes; None: there is no limit.

    Both versions of Linux' control groups. Inside a container the path in `own` may be the host's,
    which is not there: then the container's group is mounted in its place.
    """
    limits = []
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, name = groups, "memory.max"
        elif "memory" in controllers.split(","):
            top, name = groups / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = top / path.strip("/")
        for folder in [group, *(parent for parent in group.parents if parent.is_relative_to(top))]:
            limits.append(_number(folder / name))
    return min(filter(None, limits), default=None)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # absent, or "max"
        return None
