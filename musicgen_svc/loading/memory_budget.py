"""The memory budget: how many bytes of models the service may keep."""

import os
from pathlib import Path

import torch

GB = 10**9
WORKING_SPACE_CPU = 4 * GB
"""Memory for everything except weights: Python, libraries, a request's activations, keys and values."""
WORKING_SPACE_GPU = 2 * GB
"""Memory for everything except weights and the engine's buffers: a request's activations."""


def budget(device: torch.device, gigabytes: float) -> int:
    """Returns the bytes for models: `gigabytes`, or for 0 the device's memory minus working space.

    On a device with little memory, the working space is a quarter of it.
    """
    if gigabytes:
        return round(gigabytes * GB)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free - min(free // 4, WORKING_SPACE_GPU)
    available = min(filter(None, (physical(), container_limit())))
    return available - min(available // 4, WORKING_SPACE_CPU)


def physical() -> int:
    """Returns the machine's memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def container_limit(
    groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> int | None:
    """Returns the smallest memory limit of this process's control group and its parents, in bytes.

    Reads both versions of Linux' control groups. Inside a container the path in `own` may be the host's,
    which does not exist there: then the container's own group is at the top of `groups`.

    Args:
        groups: where the control groups are mounted.
        own: the file that names this process's groups.

    Returns:
        The limit; None if there is no limit.
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
    """Returns the number in a file; None if there is no file or no number."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # absent, or "max"
        return None
