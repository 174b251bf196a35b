"""Whatever goes wrong on the device becomes one sentence, and only what is final ends the service."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from musicgen_svc.errors import GenerationError, ServiceError
from musicgen_svc.pipeline import Pipeline
from musicgen_svc.service import Service
from musicgen_svc.settings import Settings

FIELDS: dict[str, Any] = {
    "model_version": "finetuned", "prompt": "a waltz", "input_audio": None, "duration": 1,
    "continuation": False, "continuation_start": 0, "continuation_end": None, "multi_band_diffusion": False,
    "normalization_strategy": "loudness", "top_k": 250, "top_p": 0, "temperature": 1,
    "classifier_free_guidance": 3, "output_format": "wav", "seed": 5,
}  # fmt: skip


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
        (torch.AcceleratorError("device-side assert triggered"), "must be restarted", False),
        (KeyError("a bug of ours"), r"failed \(KeyError\)", True),
    ],
)
def test_a_fault_is_one_sentence_and_the_next_request_is_served(
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


def test_a_device_that_is_not_there_is_named(weights: Path, tmp_path: Path) -> None:
    for device in ("cuda:99", "abacus"):
        service = Service(Settings(weights_dir=weights, work_dir=tmp_path, device=device))
        with pytest.raises(ServiceError, match=f"MUSICGEN_DEVICE is '{device}'"):
            service.start(None)


def test_a_finished_request_leaves_one_file_in_a_folder_of_its_own(service: Service) -> None:
    first, second = predict(service), predict(service)
    assert first.parent != second.parent and first.name != second.name
    assert list(first.parent.iterdir()) == [first]
    assert first.read_bytes() == second.read_bytes()
