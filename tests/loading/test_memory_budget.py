"""The memory budget and the number of slots: from the setting, the GPU or the machine."""

import pytest
import torch

from musicgen_svc.loading import memory_budget
from musicgen_svc.loading.memory_budget import GB, budget

CPU = torch.device("cpu")


def test_the_setting_is_the_budget() -> None:
    assert budget(CPU, 2.5) == 2_500_000_000


@pytest.mark.parametrize(
    ("available", "expected"), [(64, 60), (16, 12), (8, 6)], ids=["much", "enough", "little"]
)
def test_the_default_is_the_available_memory_minus_working_space(
    available: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_budget, "memory_bytes", lambda: available * GB)
    assert budget(CPU, 0) == expected * GB


def test_on_a_gpu_the_default_is_the_free_memory_minus_working_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40 * GB, 80 * GB))
    assert budget(torch.device("cuda"), 0) == 38 * GB
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * GB, 80 * GB))
    assert budget(torch.device("cuda"), 0) == 3 * GB


def test_a_device_holds_as_many_requests_as_its_whole_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole memory and not the free one: `scripts/serve` counts before anything is loaded."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 * GB, 24 * GB))
    assert memory_budget.slots(torch.device("cuda")) == 4
    for memory_gb, expected in ((8, 1), (24, 2), (64, 4), (512, 4)):
        monkeypatch.setattr(memory_budget, "memory_bytes", lambda memory_gb=memory_gb: memory_gb * GB)
        assert memory_budget.slots(CPU) == expected
