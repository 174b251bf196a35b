"""The machine that the service runs on: its memory and its cores, within the limits of a container.

Linux tells the limits of a container by control groups, of which there are two versions; both are read.
Inside a container the path of the own group may be the host's, which does not exist there: then the
container's own group is at the top of the file system of control groups.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
"""Where control groups are mounted."""
OWN_GROUPS = Path("/proc/self/cgroup")
"""The file that names the control groups of this process."""


def memory_bytes() -> int:
    """Returns the memory that this process may use: the machine's, or the container's if that is less."""
    return min(filter(None, (physical_bytes(), container_bytes())))


def physical_bytes() -> int:
    """Returns the machine's memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def container_bytes(groups: Path = GROUPS, own: Path = OWN_GROUPS) -> int | None:
    """Returns the smallest memory limit of this process's control group and its parents, in bytes.

    Args:
        groups: as `GROUPS`.
        own: as `OWN_GROUPS`.

    Returns:
        The limit; None if there is no limit.
    """
    limits = []
    for version, folder in _folders("memory", groups, own):
        limits.append(_number(folder / ("memory.max" if version == 2 else "memory.limit_in_bytes")))
    return min(filter(None, limits), default=None)


def cores(groups: Path = GROUPS, own: Path = OWN_GROUPS) -> int:
    """Returns how many processor cores this process may use, at least 1.

    It is the smallest of the machine's cores, those to which the process is bound, and the container's share
    of processor time, rounded up.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shares = [_share(version, folder) for version, folder in _folders("cpu", groups, own)]
    return max(1, min([bound, *(math.ceil(share) for share in shares if share is not None)]))


def _share(version: int, folder: Path) -> float | None:
    """Returns how many cores' time a control group may use; None if it is not limited."""
    if version == 2:
        try:
            quota, period = (folder / "cpu.max").read_text().split()
            return int(quota) / int(period)
        except (OSError, ValueError):  # absent, or "max 100000"
            return None
    quota_us, period_us = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    return quota_us / period_us if quota_us and period_us and quota_us > 0 else None


def _folders(controller: str, groups: Path, own: Path) -> Iterator[tuple[int, Path]]:
    """Yields the version and the folder of each control group that limits this process."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            version, top = 2, groups
        elif controller in controllers.split(","):
            version, top = 1, groups / controller
        else:
            continue
        group = top / path.strip("/")
        for folder in [group, *(parent for parent in group.parents if parent.is_relative_to(top))]:
            yield version, folder


def _number(path: Path) -> int | None:
    """Returns the number in a file; None if there is no file or no number."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # absent, or "max"
        return None
