"""The memory and the cores of the machine, within the limits of control groups."""

import os
from pathlib import Path

import pytest

from musicgen_svc.runtime import machine
from musicgen_svc.runtime.machine import container_bytes, cores, memory_bytes, physical_bytes


def test_the_machines_memory_is_that_of_the_kernel() -> None:
    lines = Path("/proc/meminfo").read_text().splitlines()
    total_kb = next(int(line.split()[1]) for line in lines if line.startswith("MemTotal"))
    assert physical_bytes() == total_kb * 1024


def limit(folder: Path, own: str, **files: str) -> int | None:
    """Returns the limit that is found in a folder of control groups.

    Args:
        folder: where the files are written.
        own: the content of the file that names the process's groups.
        files: contents by path below the groups' folder, with `__` for `/`.
    """
    write_groups(folder, own, files)
    return container_bytes(folder / "cgroup", folder / "own")


def write_groups(folder: Path, own: str, files: dict[str, str]) -> None:
    """Writes control groups, as `limit` describes them."""
    for name, content in files.items():
        path = folder / "cgroup" / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (folder / "own").write_text(own)


UNLIMITED = "9223372036854771712\n"


def test_a_container_sees_its_own_limit_at_the_top(tmp_path: Path) -> None:
    files = {"memory.max": "1000\n"}
    assert limit(tmp_path, "0::/\n", **files) == 1000
    assert limit(tmp_path, "0::/system.slice/docker-1.scope\n", **files) == 1000, "the path is the host's"


def test_the_smallest_limit_around_the_process_counts(tmp_path: Path) -> None:
    files = {"a__memory.max": "500\n", "a__b__memory.max": "900\n", "a__b__c__memory.max": "max\n"}
    assert limit(tmp_path, "0::/a/b/c\n", **files) == 500
    assert limit(tmp_path, "0::/other\n", **files) is None


def test_the_first_version_of_control_groups_is_read(tmp_path: Path) -> None:
    own = "9:cpu,cpuacct:/x\n4:memory:/docker/1\n0::/\n"
    files = {"memory__memory.limit_in_bytes": "700\n", "cpu,cpuacct__x__memory.limit_in_bytes": "1\n"}
    assert limit(tmp_path, own, **files) == 700
    unlimited = {"memory__memory.limit_in_bytes": UNLIMITED}
    assert limit(tmp_path, own, **unlimited) == int(UNLIMITED), "more than any machine has"


def test_without_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert container_bytes(tmp_path / "cgroup", tmp_path / "own") is None


@pytest.mark.parametrize(
    ("physical", "container", "expected"), [(64, None, 64), (64, 32, 32), (16, 32, 16)],
    ids=["machine", "container", "a container larger than the machine"],
)  # fmt: skip
def test_the_smaller_of_machine_and_container_counts(
    physical: int, container: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "physical_bytes", lambda: physical)
    monkeypatch.setattr(machine, "container_bytes", lambda: container)
    assert memory_bytes() == expected


def version_1(quota_us: str) -> dict[str, str]:
    """Returns the files of a control group of the first version that limits processor time."""
    return {"cpu__x__cpu.cfs_quota_us": quota_us, "cpu__x__cpu.cfs_period_us": "100000"}


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, 16),
        ("0::/\n", {"cpu.max": "400000 100000\n"}, 4),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/a/b\n", {"a__cpu.max": "250000 100000\n", "a__b__cpu.max": "800000 100000\n"}, 3),
        ("3:cpu,cpuacct:/x\n", version_1("200000"), 2),
        ("3:cpu,cpuacct:/x\n", version_1("-1"), 16),
        ("0::/\n", {"cpu.max": "6400000 100000\n"}, 16),
    ],
    ids=[
        "no limit", "four cores", "half a core", "the parent's limit", "version 1", "version 1, no limit",
        "more than there are",
    ],
)  # fmt: skip
def test_a_containers_share_of_the_cores_counts(
    own: str, files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a container with 2 of 64 cores would compute with 64 threads."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    write_groups(tmp_path, own, files)
    assert cores(tmp_path / "cgroup", tmp_path / "own") == expected


def test_the_cores_to_which_the_process_is_bound_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5})
    assert cores(tmp_path, tmp_path / "own") == 2
