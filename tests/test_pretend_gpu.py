"""The pretend GPU and its graphs, which other tests rely on, behave as a GPU does."""

from collections.abc import Iterator

import pytest
import torch

from tests.fixtures.pretend_gpu import DEVICE, PretendGpu, pretend_gpu


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendGpu]:
    with pretend_gpu(monkeypatch) as found:
        yield found


def test_a_pretend_gpu_refuses_two_devices_notes_waits_and_has_its_own_random_stream(gpu: PretendGpu) -> None:
    on_gpu = torch.zeros(3, device="cuda")
    assert on_gpu.is_cuda and (on_gpu + torch.tensor(2.0)).device == DEVICE
    for mixed in (lambda: on_gpu + torch.ones(3), lambda: torch.ones(()).add_(on_gpu.sum())):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()
    on_gpu[1:].mul_(2).add_(1)
    assert gpu.waits == []
    assert on_gpu.cpu().tolist() == [0, 1, 1] and bool(on_gpu.any()) and len(on_gpu[on_gpu > 0]) == 2
    assert len(gpu.waits) == 3
    streams = torch.get_rng_state(), gpu.random
    torch.randn(3, device="cuda")
    assert torch.equal(torch.get_rng_state(), streams[0]) and not torch.equal(gpu.random, streams[1])
    with torch.autocast("cuda", torch.float16):
        assert (on_gpu[None] @ on_gpu[:, None]).dtype == torch.float16


def test_operations_whose_results_depend_on_numbers_are_waits(gpu: PretendGpu) -> None:
    numbers = torch.ones(3, device="cuda")
    for wait in (numbers.nonzero, numbers.unique, lambda: torch.equal(numbers, numbers)):
        gpu.waits.clear()
        wait()
        assert gpu.waits
    index = torch.tensor([0, 2], device="cuda")
    gpu.waits.clear()
    assert numbers[index].shape == (2,) and gpu.waits == []


def test_a_recording_changes_nothing_and_a_replay_reads_present_memory_and_loses_intermediate_results(
    gpu: PretendGpu,
) -> None:
    memory, times = torch.ones(3, device="cuda"), 2
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = memory * times
        memory[1:].add_(made[1:])
    assert memory.tolist() == [1, 1, 1]
    times = 5
    graph.replay()
    memory.mul_(10)
    graph.replay()
    assert memory.tolist() == [10, 90, 90] and bool(made.isnan().all())
    for refused in (lambda: memory.tolist(), lambda: memory.add_(torch.ones(3))):
        with pytest.raises(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
            refused()


def test_torchs_check_for_waits_does_not_fail_by_its_own_warning() -> None:
    """torch warns when its check is first switched on. A warning is an error in these tests."""
    torch._C._cuda_set_sync_debug_mode(0)
