"""Errors of the device become one sentence, and only a permanent one makes the service unhealthy."""

import asyncio
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fields import FIELDS
from sounds import encode, tone
from torch import Tensor

from musicgen_svc.errors import GenerationError, InputError, ServiceError, Stopped
from musicgen_svc.pipeline import Pipeline
from musicgen_svc.runtime.device import find_device
from musicgen_svc.runtime.fair_queue import Turn
from musicgen_svc.runtime.progress import Progress, StopFlag
from musicgen_svc.service import Service
from musicgen_svc.settings import Settings


@pytest.fixture
def service(weights: Path, tmp_path: Path) -> Service:
    made = Service(Settings(weights_dir=weights, work_dir=tmp_path, device="cpu"))
    made.start(str(weights / "small"))
    return made


def predict(service: Service) -> Path:
    return asyncio.run(service.predict(FIELDS, lambda name, value: None))


@pytest.mark.parametrize(
    ("error", "words", "healthy"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "ran out of memory", True),
        (MemoryError(), "ran out of memory", True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "ran out of memory", True),
        (torch.AcceleratorError("CUDA error: out of memory"), "ran out of memory", True),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            "ran out of",
            True,
        ),
        (RuntimeError("could not create a primitive"), "ran out of memory", True),
        (
            RuntimeError("could not create a primitive descriptor for a matmul"),
            r"failed \(RuntimeError\)",
            True,
        ),
        (torch.AcceleratorError("device-side assert triggered"), "must be restarted", False),
        (KeyError("a bug of ours"), r"failed \(KeyError\)", True),
    ],
)
def test_an_error_is_one_sentence_and_the_next_request_is_served(
    service: Service, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    error: Exception, words: str, healthy: bool,
) -> None:  # fmt: skip
    def fail(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "run", fail)
        with pytest.raises(GenerationError, match=words):
            predict(service)
    assert type(error).__name__ in capsys.readouterr().err, "the cause goes to the log"
    assert service.healthy() is healthy
    assert predict(service).is_file()


def test_a_request_that_cog_gave_up_ends(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    """Cog may give up a prediction, and answer the client, while the prediction runs."""
    stop = threading.Event()

    async def main() -> None:
        fields = FIELDS | {"duration": 600}
        running = asyncio.create_task(service.predict(fields, lambda name, value: None, stop.is_set))
        while "generate" not in capsys.readouterr().err:
            await asyncio.sleep(0.05)
        stop.set()
        with pytest.raises(Stopped):
            await running

    asyncio.run(main())
    assert "gave this prediction up" in capsys.readouterr().out
    assert predict(service).is_file()


def test_a_repeated_cancel_does_not_free_the_slot_before_the_thread_has_ended(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the next request, perhaps for another model, would run beside it."""
    begun, end = threading.Event(), threading.Event()

    def run(*_: Any) -> None:
        begun.set()
        end.wait()
        raise Stopped

    async def main() -> None:
        running = asyncio.create_task(service.predict(FIELDS, lambda name, value: None))
        while not begun.is_set():
            await asyncio.sleep(0.01)
        for _ in range(3):
            running.cancel()
            await asyncio.sleep(0.01)
        assert service._room and service._room.running == 1 and not running.done()
        end.set()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert service._room.running == 0

    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "run", run)
        asyncio.run(main())
    assert predict(service).is_file()


def test_a_missing_device_is_named(weights: Path, tmp_path: Path) -> None:
    for device in ("cuda:99", "abacus"):
        service = Service(Settings(weights_dir=weights, work_dir=tmp_path, device=device))
        with pytest.raises(ServiceError, match=f"MUSICGEN_DEVICE is '{device}'"):
            service.start(None)


def test_every_thread_uses_the_gpu_that_was_asked_for(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new thread uses the first GPU, and Triton launches on the thread's GPU."""
    used: dict[str, torch.device] = {}
    run = Pipeline.run

    def ran(*args: Any) -> Any:
        assert used == {threading.current_thread().name: torch.device("cuda:1")}
        return run(*args)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: used.update({threading.current_thread().name: device})
    )
    monkeypatch.setattr(Pipeline, "run", ran)
    service._device = find_device("cuda:1")
    assert predict(service).is_file()


def test_a_gpu_is_named_with_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, expected in (("auto", "cuda:0"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1"), ("cpu", "cpu")):
        assert str(find_device(name)) == expected


def test_the_precision_on_a_gpu_does_not_depend_on_the_environment(weights: Path) -> None:
    """The variable is one that containers set. PyTorch reads it when it is imported."""
    check = """
import sys, torch
from musicgen_svc.backend import Backend
from musicgen_svc.settings import Settings
torch.backends.cudnn.allow_tf32 = False
assert torch.backends.cuda.matmul.allow_tf32
Backend.open(Settings(device="cpu"), sys.argv[1])
assert torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
"""
    environment = os.environ | {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    command = [sys.executable, "-c", check, str(weights / "small")]
    subprocess.run(command, env=environment, check=True)


def test_the_reason_why_a_gpu_cannot_be_used_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For example an old driver. The server hides warnings, also PyTorch's warning about it."""

    def refuse() -> int:
        raise RuntimeError("The NVIDIA driver on your system is too old\n(found version 12040).")

    reason = r"the GPU cannot be used: The NVIDIA driver on your system is too old \(found version 12040\)\.$"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", refuse)
    assert str(find_device("auto")) == "cpu"
    assert re.search(reason, capsys.readouterr().out.strip())
    with pytest.raises(ServiceError, match=reason):
        find_device("cuda")
    assert str(find_device("cpu")) == "cpu"
    assert capsys.readouterr().out == ""

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert str(find_device("auto")) == "cpu"
    assert capsys.readouterr().out == "", "without a GPU there is nothing to show"


@pytest.mark.parametrize("version", ["finetuned", "encode-decode"])
def test_diffusion_for_another_codec_is_refused_before_the_work(
    version: str, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a minute of music would be generated that cannot be decoded."""
    own, folder = shutil.copytree(weights / "small", tmp_path / "own"), tmp_path / "weights"
    package = torch.load(own / "compression_state_dict.bin", weights_only=True)
    next(tensor for name, tensor in package["best_state"].items() if name.endswith("embed")).add_(0.01)
    torch.save(package, own / "compression_state_dict.bin")
    folder.mkdir()
    for name in ("t5-small", "multiband-diffusion"):
        (folder / name).symlink_to(weights / name)
    service = Service(Settings(weights_dir=folder, work_dir=tmp_path, device="cpu"))
    service.start(str(own))
    clip = tmp_path / "clip.wav"
    clip.write_bytes(encode(tone(330.0, 1.0, 32_000), 32_000, "wav16"))

    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("the work began")

    monkeypatch.setattr("musicgen_svc.pipeline.prepare", work)
    monkeypatch.setattr("musicgen_svc.models.encodec.Codec.encode", work)
    change = {"multi_band_diffusion": True, "model_version": version}
    if version == "encode-decode":
        change["input_audio"] = clip
    with pytest.raises(InputError, match="multi_band_diffusion is true, but"):
        asyncio.run(service.predict(FIELDS | change, lambda name, value: None))


def test_a_finished_request_leaves_one_file_in_a_folder_of_its_own(service: Service) -> None:
    first, second = predict(service), predict(service)
    assert first.parent != second.parent and first.name != second.name
    assert list(first.parent.iterdir()) == [first]
    assert first.read_bytes() == second.read_bytes()


@pytest.fixture
def shared(weights: Path, tmp_path: Path) -> Service:
    made = Service(Settings(weights_dir=weights, work_dir=tmp_path, device="cpu", slots=4, max_concurrency=4))
    made.start(str(weights / "melody"))
    return made


def predict_all(service: Service, *changes: dict[str, Any]) -> list[Any]:
    """Runs several requests at once; returns the path or exception of each."""

    async def run() -> list[Any]:
        jobs = [service.predict(FIELDS | change, lambda name, value: None) for change in changes]
        return await asyncio.gather(*jobs, return_exceptions=True)

    return asyncio.run(run())


def test_work_that_yields_the_device_gives_the_same_result(
    shared: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Demucs and the diffusion draw from the global generators, and yield the device while they run."""
    clip = tmp_path / "clip.wav"
    clip.write_bytes(encode(tone(330.0, 20.0, 32_000), 32_000, "wav16"))
    changes: list[dict[str, Any]] = [
        {"multi_band_diffusion": True},
        {"multi_band_diffusion": True, "seed": 6},
        {"input_audio": clip, "seed": 7},
        {"input_audio": clip, "model_version": "encode-decode"},
    ]
    alone = [predict_all(shared, change)[0].read_bytes() for change in changes]
    monkeypatch.setattr("musicgen_svc.runtime.fair_queue.TURN_S", 0.003)
    yields: list[bool] = []
    yield_turn = Turn.yield_turn
    monkeypatch.setattr(
        Turn, "yield_turn", lambda turn, check: [yields.append(True), yield_turn(turn, check)][1]
    )
    assert [path.read_bytes() for path in predict_all(shared, *changes)] == alone
    assert len(yields) > 20, "the device was hardly ever yielded"


def test_a_failed_shared_step_is_a_sentence_for_each_request_and_the_next_one_is_served(
    shared: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shared._pipeline
    decoder = shared._pipeline._loader.model("finetuned").engine.decoder
    compute = decoder.logits

    def fail_with_three(tokens: Tensor, *rest: Any) -> Tensor:
        if len(tokens) == 3:
            raise torch.OutOfMemoryError("in the middle of it")
        return compute(tokens, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(decoder, "logits", fail_with_three)
        for end in predict_all(shared, *({"duration": 20, "seed": seed} for seed in range(3))):
            assert isinstance(end, GenerationError) and "ran out of memory" in str(end)
    assert shared.healthy() and predict(shared).is_file()


def test_a_request_that_is_cancelled_while_it_waits_lets_the_next_one_begin(shared: Service) -> None:
    """`small` waits for `finetuned`, and the next request for `finetuned` waits behind it."""
    room = shared._room
    assert room

    async def run() -> list[str]:
        ended: list[str] = []

        async def ask(name: str, **change: Any) -> None:
            await shared.predict(FIELDS | change, lambda name, value: None)
            ended.append(name)

        async def queued(number: int) -> None:
            while room.running + room.waiting < number:
                await asyncio.sleep(0.01)

        async def cancelled(task: asyncio.Task[None]) -> None:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        long = asyncio.create_task(ask("long", duration=600))
        await queued(1)
        other = asyncio.create_task(ask("other", model_version="small"))
        await queued(2)
        short = asyncio.create_task(ask("short"))
        await queued(3)
        await asyncio.sleep(0.3)
        assert not ended
        await cancelled(other)
        await short
        await cancelled(long)
        return ended

    assert asyncio.run(run()) == ["short"]


def test_the_time_of_waiting_for_another_diffusion_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    clock = SimpleNamespace(monotonic=lambda: now_s, perf_counter=lambda: now_s)
    monkeypatch.setattr("musicgen_svc.runtime.progress.time", clock)
    stop = StopFlag(10.0)
    with Progress({"queue": 1, "decode": 1}, stop) as progress:
        stop.start_clock()
        with progress.waiting():
            now_s = 100.0
            progress.check()
        with progress.stage("decode") as tick:
            now_s = 109.0
            tick(0, 1)
            now_s = 111.0
            with pytest.raises(GenerationError, match="ran longer than the limit"):
                tick(1, 1)
