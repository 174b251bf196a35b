"""What is loaded onto a GPU is run once before its first request, and no request can tell."""

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fields import FIELDS

from musicgen_svc.engine.static import StaticBatch
from musicgen_svc.loading import warm_up
from musicgen_svc.loading.loader import Loader
from musicgen_svc.models.demucs import Separator
from musicgen_svc.models.encodec import Codec
from musicgen_svc.models.encodec_stream import CodecStream
from musicgen_svc.models.multiband_diffusion import MultiBandDiffusion
from musicgen_svc.models.t5 import T5Encoder
from musicgen_svc.pipeline import Pipeline, stage_shares
from musicgen_svc.request import Request
from musicgen_svc.runtime.fair_queue import FairQueue
from musicgen_svc.runtime.progress import Progress, StopFlag
from musicgen_svc.settings import Settings
from musicgen_svc.weights.catalog import read_catalog
from musicgen_svc.weights.paths import Weights
from tests.fixtures.pretend_gpu import PretendGpu, pretend_gpu

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
WATCHED: dict[str, tuple[type, str]] = {
    "T5": (T5Encoder, "forward"),
    "Demucs": (Separator, "__call__"),
    "prefill": (StaticBatch, "open"),
    "encode": (Codec, "encode"),
    "decode": (Codec, "decode"),
    "live": (CodecStream, "finish"),
}
ONCE = Counter(dict.fromkeys(WATCHED, 1))
WITHOUT_DEMUCS = ONCE - Counter({"Demucs": 1})


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendGpu]:
    monkeypatch.setattr(warm_up, "SECONDS", 1)
    with pretend_gpu(monkeypatch) as found:
        yield found


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the calls of each part."""
    counted = Counter[str]()

    def watch(part: str, owner: type, name: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            counted[part] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for part, (owner, name) in WATCHED.items():
        watch(part, owner, name)
    return counted


def loader(weights: Path, device: torch.device, queue: FairQueue | None = None) -> Loader:
    """Graphs are on without a test at load, which would be one more prefill."""
    return Loader(Weights.at(weights, read_catalog(), None), device, Settings(cuda_graphs="on"), queue)


def streams(gpu: PretendGpu) -> list[Any]:
    return [random.getstate(), torch.get_rng_state().tolist(), gpu.random.tolist()]


def song(given: Loader, queue: FairQueue, folder: Path) -> bytes:
    """Runs a request for one second of the model `small`, and returns its file."""
    request = Request.from_fields(FIELDS | {"model_version": "small"}, 600)
    with Progress(stage_shares(request), StopFlag(1000)) as progress:
        result = Pipeline(given, queue, tag_prompt=False).run(request, progress, folder)
    return result.path.read_bytes()


def test_all_parts_of_a_model_run_once_when_it_is_loaded_and_its_step_is_recorded(
    gpu: PretendGpu, weights: Path, calls: Counter[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Another model is run when it is loaded, and a model that stays in memory is not run again."""
    given, before = loader(weights, GPU), streams(gpu)
    batch = given.model("melody").engine.batch
    assert calls == ONCE and streams(gpu) == before
    assert isinstance(batch, StaticBatch) and batch.slots == [] and batch.graphed.recordings
    assert "model_version 'melody' was run once before its first request" in capsys.readouterr().out
    given.model("melody")
    assert calls == ONCE
    given.model("small")
    assert calls == ONCE + WITHOUT_DEMUCS and "'small'" in capsys.readouterr().out


def test_nothing_is_run_on_a_cpu(
    weights: Path, calls: Counter[str], capsys: pytest.CaptureFixture[str]
) -> None:
    given = loader(weights, CPU)
    given.model("melody")
    given.codec()
    assert calls == {} and capsys.readouterr().out == ""


def test_a_codec_and_multiband_diffusion_are_run_once_when_they_are_loaded_later(
    gpu: PretendGpu, weights: Path, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[torch.Size] = []
    monkeypatch.setattr(MultiBandDiffusion, "decode", lambda self, tokens: decoded.append(tokens.shape))
    given = loader(weights, GPU)
    for _ in range(2):
        checkpoint, codec = given.codec()
        assert calls == {"encode": 1, "decode": 1, "live": 1}
        given.diffusion(checkpoint, codec)
        assert decoded == [(4, codec.frame_rate)]


def test_a_request_has_the_same_bytes_with_it_and_without_it(
    gpu: PretendGpu, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    songs = []
    for skipped in (False, True):
        if skipped:
            monkeypatch.setattr(warm_up, "_run_model", lambda model: None)
        queue = FairQueue(1)
        given = loader(weights, GPU, queue)
        given.model("small")
        songs.append(song(given, queue, tmp_path))
    assert songs[0] == songs[1]


def test_without_enough_memory_a_model_is_loaded_and_a_sentence_says_so(
    gpu: PretendGpu, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nA hint.")

    queue = FairQueue(1)
    given = loader(weights, GPU, queue)
    with monkeypatch.context() as patch:
        patch.setattr(StaticBatch, "run", fail)
        batch = given.model("small").engine.batch
    assert isinstance(batch, StaticBatch) and batch.slots == []
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "'small' was not run before its first request" in said and "Tried to allocate 2 GiB." in said
    assert song(given, queue, tmp_path)


def test_another_error_is_that_of_the_loading(
    gpu: PretendGpu, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each request would end with it."""

    def fail(*_: Any) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    before = streams(gpu)
    monkeypatch.setattr(Codec, "decode", fail)
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        loader(weights, GPU).start()
    assert streams(gpu) == before
