"""The memory budget: from the setting, the GPU, the container or the machine."""

from pathlib import Path

import pytest
import torch

from musicgen_svc.loading import memory_budget
from musicgen_svc.loading.memory_budget import GB, budget, container_limit

CPU = torch.device("cpu")


def test_the_setting_is_the_budget() -> None:
    assert budget(CPU, 2.5) == 2_500_000_000


@pytest.mark.parametrize(
    ("physical", "container", "expected"),
    [(64, None, 60), (64, 32, 28), (16, 32, 12), (8, None, 6)],
    ids=["machine", "container", "a container larger than the machine", "little memory"],
)
def test_the_default_is_the_available_memory_minus_working_space(
    physical: int, container: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_budget, "physical", lambda: physical * GB)
    monkeypatch.setattr(memory_budget, "container_limit", lambda: container and container * GB)
    assert budget(CPU, 0) == expected * GB


def test_on_a_gpu_the_default_is_the_free_memory_minus_working_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40 * GB, 80 * GB))
    assert budget(torch.device("cuda"), 0) == 38 * GB
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * GB, 80 * GB))
    assert budget(torch.device("cuda"), 0) == 3 * GB


def test_the_machines_memory_is_that_of_the_kernel() -> None:
    lines = Path("/proc/meminfo").read_text().splitlines()
    total_kb = next(int(line.split()[1]) for line in lines if line.startswith("MemTotal"))
    assert memory_budget.physical() == total_kb * 1024


def limit(folder: Path, own: str, **files: str) -> int | None:
    """Returns the limit that is found in a folder of control groups.

    Args:
        folder: where the files are written.
        own: the content of the file that names the process's groups.
        files: contents by path below the groups' folder, with `__` for `/`.
    """
    for name, content in files.items():
        path = folder / "cgroup" / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (folder / "own").write_text(own)
    return container_limit(folder / "cgroup", folder / "own")


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
    assert container_limit(tmp_path / "cgroup", tmp_path / "own") is None
