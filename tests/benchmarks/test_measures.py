"""What `scripts/bench` measures besides speed is right, and all implementations do the same work."""

import dataclasses
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks import beside, launches, sides
from benchmarks.agreement import LEAST_TOP1, likeliest, with_audiocraft
from benchmarks.growth import growth
from benchmarks.random_models import audiocraft_generates, conditions, language_model
from benchmarks.workload import Workload, stored_in_float16
from musicgen_svc.engine import ragged
from musicgen_svc.engine.factory import BatchKind, batch_for
from musicgen_svc.engine.projections import packs_float16
from musicgen_svc.engine.sampling_params import SamplingParams
from musicgen_svc.engine.static import CHUNK
from musicgen_svc.models.meta_init import on_meta

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def _work(frames: int = 47, *, device: str = "cpu", **size: Any) -> Workload:
    lm = language_model(dim=64, layers=2, device=device, **size)
    given = {name: (x.to(device), mask.to(device)) for name, (x, mask) in conditions(dim=64).items()}
    return Workload(lm, [given], frames, SamplingParams(), torch.device(device))


def test_transformers_does_the_same_work() -> None:
    """With the same weights, guidance and number of frames, greedy tokens are the same."""
    from benchmarks.transformers_generate import TransformersMusicgen

    work, greedy = _work(20), SamplingParams(temperature=0)
    ours = audiocraft_generates(work.lm, work.given[0], prompt=None, length=20, sampling=greedy, seed=0)
    theirs = TransformersMusicgen(work.lm).generate(work.given[0], length=20, sampling=greedy, seed=0)
    assert torch.equal(ours, theirs)


def test_a_shorter_piece_is_compared_except_for_its_last_frames() -> None:
    long, short = _work(30), _work(15)
    (tokens,) = long.engine(batch_for(long.lm), 1)
    expected = short.audiocraft()
    assert not torch.equal(tokens[:, :15], expected)  # its last frames are drawn beside the delayed end
    assert sides.compared(tokens, expected, long) == "equal"
    expected[2, 11] += 1
    assert sides.compared(tokens, expected, long) == "differ from frame 11"


def test_multiband_diffusion_has_the_published_widths() -> None:
    with on_meta():
        unet = beside.builders.get_diffusion_model(beside.band_config(beside.RELEASED))
    widths = [layer.conv.out_channels for layer in unet.encoders]
    assert widths == [48, 192, 768, 3072] and unet.conv_codec.in_channels == 128


def test_bytes_read_are_the_weights_and_the_mean_cache() -> None:
    work = _work(47, card=100)
    layer = 64 * 64 * (4 + 2 + 8)  # self-attention, query and output of cross-attention, feed-forward
    norms = 2 * (2 * 3 * 64) + 2 * 64
    weights = 2 * layer + 4 * 100 * 64 + norms
    position = 2 * 2 * 2 * 64  # keys and values, rows, layers, dim
    assert work.bytes_per_position(3) == 4 * 3 * position
    assert work.bytes_per_step(1) == 4 * (weights + position * 50 / 2)  # half of the columns
    assert work.bytes_per_step(3) == 4 * (weights + 3 * position * 50 / 2)
    for precision, size in (("reference", 4), ("float16", 2), ("bfloat16", 2), ("int8", 1)):
        assert work.bytes_per_step(1, precision) == size * weights + 4 * position * 50 / 2
    if packs_float16(torch.ones(1, 1)):
        stored_in_float16(work.lm)
        assert work.bytes_per_step(1) == 2 * weights + 4 * position * 50 / 2


# --- step times by position ---------------------------------------------------------------------


def test_steps_that_take_equally_long_do_not_grow() -> None:
    found = growth([[0.16] * 90, [0.16] * 90], steps=16, position_s=0)
    assert found is not None
    assert found.early_s == found.late_s == pytest.approx(0.01)
    assert abs(found.early_step - 100) <= 16 and found.late_step == 90 * 16 - 24
    assert found.ratio_beyond_cache == pytest.approx(1)


def test_growth_beyond_the_cache_leaves_out_what_the_cache_explains() -> None:
    chunks = [16 * (0.010 + 1e-6 * (16 * i + 8)) for i in range(90)]
    found, explained = (growth([chunks], steps=16, position_s=s) for s in (0, 1e-6))
    assert found is not None and explained is not None
    assert found.ratio > 1.1
    assert found.ratio_beyond_cache == pytest.approx(found.ratio)
    assert explained.ratio_beyond_cache == pytest.approx(1)


def test_a_short_piece_has_no_growth() -> None:
    assert growth([[0.1] * 8], steps=16, position_s=0) is None


def test_a_decode_gives_the_seconds_of_its_full_chunks() -> None:
    work, seconds = _work(100), list[float]()
    work.engine(batch_for(work.lm), 1, seconds)
    assert len(seconds) == 102 // CHUNK and min(seconds) > 0


# --- launches and syncs -------------------------------------------------------------------------


def _events(**names: int) -> list[SimpleNamespace]:
    """Makes as many events of each name on the host, or on the device for `gpu_NAME`."""
    return [
        SimpleNamespace(
            name=name.removeprefix("gpu_"),
            device_type=DeviceType.CUDA if name.startswith("gpu_") else DeviceType.CPU,
        )
        for name, times in names.items()
        for _ in range(times)
    ]


def test_launches_syncs_and_kernels_are_counted_apart() -> None:
    events = _events(
        cudaLaunchKernel=5, cuLaunchKernelEx=2, cudaGraphLaunch=1, cudaMemcpyAsync=3, cudaMemsetAsync=1,
        cudaStreamSynchronize=2, cudaDeviceSynchronize=1, cudaEventSynchronize=1, cudaMemcpy=1,
        cudaMalloc=9, cudaStreamWaitEvent=9, cudaEventRecord=9, synchronize=9, mm=9,
        gpu_gemm=7, gpu_cudaLaunchKernel=1, gpu_Memcpy=4, gpu_Memset=1,
    )  # fmt: skip
    assert launches.count(events) == launches.Counts(launches=13, syncs=5, kernels=8)


def test_a_run_is_profiled_without_a_warning() -> None:
    names = [event.name for event in launches.profiled(lambda: torch.ones(8).sum())]
    assert "aten::sum" in names


def test_counts_per_step_leave_out_what_happens_once_per_run(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []

    def profiled(run: Callable[[], object]) -> list[SimpleNamespace]:
        run()
        return _events(cudaLaunchKernel=100 + 3 * runs[-1], cudaStreamSynchronize=runs[-1] // 2 + 1)

    monkeypatch.setattr(launches, "profiled", profiled)
    assert launches.per_step(runs.append) == {"launches": 3, "syncs": 1 / 2, "kernels": 0}
    assert runs == [6, 2, 6]  # the first run does what is done only once


def _on_device(*events: tuple[str, float, float]) -> list[SimpleNamespace]:
    """Makes events on the device: (name, start, end), in microseconds."""
    return [
        SimpleNamespace(
            name=name, device_type=DeviceType.CUDA, time_range=SimpleNamespace(start=start, end=end)
        )
        for name, start, end in events
    ]


def test_kernels_that_overlap_are_not_counted_twice() -> None:
    """In each of two steps `b` starts 3 us before the end of `a`, and then the device waits for 2 us."""
    step = [("a", 0.0, 8.0), ("b", 5.0, 10.0), ("a", 12.0, 14.0)]
    events = _on_device(*[(name, at + start, at + end) for at in (100, 116) for name, start, end in step])
    us, (a, b) = launches.kernels_of([*_events(mm=3), *reversed(events)], steps=2)
    assert us == 15  # from 100 to 130
    assert (a.name, a.per_step, a.us, a.share) == ("a", 2, 5, pytest.approx(20 / 30))
    assert (b.name, b.per_step, b.us, b.share) == ("b", 1, 2, pytest.approx(4 / 30))


@pytest.mark.parametrize("frames", [3, 100])
def test_a_profile_is_of_full_steps_at_the_end_of_the_piece(
    frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = _work(frames)
    batch = batch_for(work.lm, slots=2, batch_kind="static")
    read: list[list[int]] = []

    def profiled(run: Callable[[], object]) -> list[SimpleNamespace]:
        before = [slot.filled for slot in batch.slots]
        run()
        steps = batch.slots[0].filled - before[0]
        read.append(before)
        return _events(cudaGraphLaunch=steps, cudaDeviceSynchronize=2) + _on_device(("k", 0, steps))

    monkeypatch.setattr(launches, "profiled", profiled)
    work = dataclasses.replace(work, given=[*work.given] * 2)
    found = launches.step_profile(work, batch, 2)
    assert found is not None and found.per_step == {"launches": 1, "syncs": 0, "kernels": 0}
    assert found.us == 1 and found.kernels[0].per_step == 1 / launches.STEPS[1]
    assert all(len(slots) == 2 and min(slots) >= frames - 25 for slots in read)
    assert not batch.slots


def test_nothing_is_said_of_kernels_that_no_profile_shows() -> None:
    assert launches.step_profile(_work(30), batch_for(_work(30).lm, batch_kind="static"), 1) is None


@needs_gpu
@pytest.mark.cuda
def test_a_recorded_step_has_fewer_than_four_launches() -> None:
    work = _work(device="cuda", dtype=torch.float16)
    profiles = [launches.step_profile(work, batch_for(work.lm, graphs=graphs), 1) for graphs in ("on", "off")]
    recorded, launched = profiles
    assert recorded is not None and launched is not None
    assert 1 <= recorded.per_step["launches"] < 4 and recorded.per_step["syncs"] <= 1 / CHUNK
    assert launched.per_step["launches"] > 20 and recorded.per_step["kernels"] > 20
    for profile in (recorded, launched):
        assert sum(kernel.per_step for kernel in profile.kernels) >= profile.per_step["kernels"] > 0
        assert 0 < sum(kernel.share for kernel in profile.kernels) <= 1 + 1e-6


# --- agreement ----------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("batch_kind", ["ragged", "static"])
def test_the_engine_agrees_with_audiocraft(batch_kind: BatchKind, slots: int) -> None:
    work = _work()
    batch = batch_for(work.lm, slots=slots, batch_kind=batch_kind)
    found = with_audiocraft(work, batch, slots, likeliest(work, 12))
    assert (found.top1, found.first_divergence, found.frames) == (1, None, 12)


def test_a_single_wrong_token_is_found_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    draw, calls = ragged.draw, itertools.count(1)

    def wrong_once(*args: Any) -> torch.Tensor:
        drawn = draw(*args)
        if next(calls) == 6:  # column 6: frame 5 of the first codebook, frame 4 of the second ...
            drawn[1] = (drawn[1] + 1) % 2048
        return drawn

    monkeypatch.setattr(ragged, "draw", wrong_once)
    work = _work()
    found = with_audiocraft(work, batch_for(work.lm), 1, likeliest(work, 12))
    assert found.first_divergence == 4
    assert found.top1 == pytest.approx(1 - 1 / 48)  # the next steps read audiocraft's token


@needs_gpu
@pytest.mark.cuda
def test_the_engine_agrees_with_audiocraft_on_a_gpu() -> None:
    work = _work(device="cuda", dtype=torch.float16)
    batch, expected = batch_for(work.lm, slots=2), likeliest(work)
    assert all(with_audiocraft(work, batch, slots, expected).top1 > LEAST_TOP1 for slots in (1, 2))
