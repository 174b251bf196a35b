"""A worker: errors become sentences, except one after which its process can run nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from sounds import encode, tone

from musicgen_svc.backend import DeviceError
from musicgen_svc.batch.work import MADE_OF
from musicgen_svc.batch.worker import Worker
from musicgen_svc.pipeline import Pipeline
from tests.fields import FIELDS

Json = dict[str, Any]


@pytest.fixture
def worker(weights: Path, monkeypatch: pytest.MonkeyPatch) -> Worker:
    monkeypatch.setenv("MUSICGEN_WEIGHTS_DIR", str(weights))
    monkeypatch.setenv("MUSICGEN_DEVICE", "cpu")
    monkeypatch.delenv("COG_WEIGHTS", raising=False)
    return Worker(slots=2, threads=0)


def task(known: Json | None = None, **changes: Any) -> Json:
    return {"id": "a", "fields": FIELDS | {"model_version": "small"} | changes, "clip": None, "known": known}


def test_a_row_is_unchanged_for_the_same_model_parts_and_clip_and_no_model_is_loaded_to_see_it(
    worker: Worker, tmp_path: Path
) -> None:
    made = worker.run(task(), tmp_path)
    assert made["error"] is None and Path(made["file"]).parent == tmp_path
    assert made["audio_s"] == 1.0 and made["generate_s"] > 0
    known = {name: made[name] for name in MADE_OF}
    assert known["clip_sha256"] is None

    later = Worker(slots=2, threads=0)
    assert later.unchanged(task(known), tmp_path)
    for name in MADE_OF:
        assert not later.unchanged(task(known | {name: "another"}), tmp_path)
    assert not later.unchanged(task(known, model_version="large"), tmp_path), "it has no weights"
    assert not later._backend.loader.in_memory("small")


def test_the_parts_that_a_row_needs_are_hashed_with_it(worker: Worker, tmp_path: Path) -> None:
    """MultiBand Diffusion and Demucs belong to the rows that use them."""
    (tmp_path / "clip.wav").write_bytes(encode(tone(220.0, 1.5, 32_000), 32_000, "wav16"))
    clip = str(tmp_path / "clip.wav")
    text = {"model_version": "melody"}
    hashes = {
        worker.run(task() | {"clip": clip, "fields": FIELDS | fields}, tmp_path)["parts_sha256"]
        for fields in (
            text | {"continuation": True},
            text | {"continuation": True, "multi_band_diffusion": True},
            text,
            {"model_version": "encode-decode"},
            {"model_version": "encode-decode", "multi_band_diffusion": True},
        )
    }
    assert len(hashes) == 5


@pytest.mark.parametrize(("packed", "rows"), [(True, 3), (False, 1)])
def test_rows_of_a_model_that_could_change_each_others_bits_run_one_at_a_time(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, packed: bool, rows: int
) -> None:
    """Without FBGEMM's kernels the products of several requests may be rounded differently."""
    if packed and torch.backends.quantized.engine not in ("x86", "fbgemm"):
        pytest.skip("this machine has no such kernels")
    if not packed:
        monkeypatch.setattr("musicgen_svc.engine.projections.packs_float16", lambda weight: False)
    capacity = worker.prepare("small")
    assert capacity and capacity["rows"] == rows and capacity["device"] == "cpu"


def test_the_first_model_that_loads_decides_the_number_of_threads(worker: Worker) -> None:
    assert worker.prepare("large") is None
    capacity = worker.prepare("small")
    assert capacity and capacity["threads"] == 1
    assert worker._backend.loader.threads.most == 1


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "The device ran out of memory: ask for"),
        (KeyError("a bug of ours"), "The service failed (KeyError); its log has the cause."),
    ],
)
def test_an_unexpected_error_is_a_sentence_and_its_cause_is_in_the_log(
    worker: Worker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    words: str,
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Pipeline, "run", fail)
    assert worker.run(task(), tmp_path)["error"].startswith(words)
    assert type(error).__name__ in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_device_that_failed_for_good_ends_the_worker(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise torch.AcceleratorError("device-side assert triggered")

    monkeypatch.setattr(Pipeline, "run", fail)
    with pytest.raises(DeviceError):
        worker.run(task(), tmp_path)
