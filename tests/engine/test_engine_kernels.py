"""The kernels give what the plain operations give: by Triton's interpreter on a CPU, and on a GPU."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from _kernel_checks import CHECKS

from benchmarks.random_models import conditions, language_model
from musicgen_svc.engine import factory
from musicgen_svc.engine.engine import Engine
from musicgen_svc.engine.factory import Switch, batch_for, kernels_that_work, operations_for
from musicgen_svc.engine.operations import PLAIN, Operations, PlainOperations
from musicgen_svc.engine.sampling_params import SamplingParams
from musicgen_svc.engine.selftest import Shape
from musicgen_svc.engine.state import ActiveExtent
from musicgen_svc.engine.static import StaticBatch

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SHAPE = Shape(dim=32, heads=2, codebooks=2, card=70, dtype=torch.float32)


def altered(**members: object) -> Operations:
    """The plain operations with some members replaced."""
    operations = PlainOperations()
    operations.__dict__.update(members)
    return operations


BY_LENGTH = altered(reads_lengths=True)
CPU = torch.device("cpu")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def program(name: str, folder: Path, **environment: str) -> dict[str, str | None]:
    """What each check of such a program said, None where it passed. Triton's files go into the folder."""
    paths = os.pathsep.join(str(path) for path in (ROOT, ROOT / "scripts"))
    ran = subprocess.run(
        [sys.executable, "-W", "error", HERE / name], capture_output=True, text=True, timeout=280,
        env=os.environ | {"PYTHONPATH": paths, "TRITON_CACHE_DIR": str(folder)} | environment,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return dict(json.loads(line) for line in ran.stdout.splitlines())


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    pytest.importorskip("triton")
    return program(
        "_kernel_checks.py", tmp_path_factory.mktemp("triton"), TRITON_INTERPRET="1", OMP_NUM_THREADS="1"
    )


@pytest.mark.parametrize("check", CHECKS)
def test_by_the_interpreter(check: str, interpreted: dict[str, str | None]) -> None:
    wrong = interpreted[check]
    assert wrong is None, wrong


def test_they_compile_for_an_h200_without_one(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    found = program("_kernel_builds.py", tmp_path, TRITON_INTERPRET="0")
    wrong = {name: reason for name, reason in found.items() if reason is not None}
    assert len(found) == 9 and not wrong, "\n".join(f"{name}: {reason}" for name, reason in wrong.items())


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("check", CHECKS)
def test_on_a_gpu(check: str) -> None:
    with torch.inference_mode():
        CHECKS[check](torch.device("cuda"))


# --- which operations an engine takes -----------------------------------------------------------


def test_on_a_cpu_the_plain_ones_are_taken() -> None:
    assert operations_for(language_model(dim=32, layers=1, heads=2)) is PLAIN


def test_they_are_off_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = language_model(dim=32, layers=1, heads=2)
    monkeypatch.setattr(factory, "_kernels", lambda: BY_LENGTH)
    assert batch_for(lm, kind="static", kernels="on").decoder.operations is BY_LENGTH
    assert batch_for(lm, kind="static", kernels="off").decoder.operations is PLAIN
    assert batch_for(lm, kind="ragged", kernels="on").decoder.operations is PLAIN


def _raise(exc: Exception) -> Operations:
    raise exc


@pytest.mark.parametrize(
    ("kernels", "said"),
    [
        (partial(_raise, ImportError("No module named 'triton'")), "No module named 'triton'"),
        (partial(_raise, RuntimeError("Failed to find C compiler.")), "Failed to find C compiler."),
        (lambda: altered(draw=lambda *given: PLAIN.draw(*given) + 1), "other tokens are drawn"),
    ],
)
def test_an_engine_does_without_kernels_that_do_not_work(
    kernels: Callable[[], Operations],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(factory, "_kernels", kernels)
    with caplog.at_level(logging.WARNING):
        assert kernels_that_work(SHAPE, CPU) is PLAIN
    assert said in caplog.text


def test_kernels_that_agree_are_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(factory, "_kernels", lambda: BY_LENGTH)
    assert kernels_that_work(SHAPE, CPU) is BY_LENGTH
    assert not caplog.text


def test_with_them_a_number_of_slots_has_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the position and the text."""
    monkeypatch.setattr(factory, "_kernels", lambda: BY_LENGTH)
    lm = language_model(dim=32, layers=1, heads=2, card=40)
    keys: dict[Switch, set[ActiveExtent]] = {"on": set(), "off": set()}
    codes = []
    for kernels, seen in keys.items():
        batch = batch_for(lm, slots=2, kind="static", kernels=kernels)
        assert isinstance(batch, StaticBatch)
        step = batch._step
        batch.graphed._function = lambda reach, step=step, seen=seen: (seen.add(reach), step(reach))
        for tokens in (5, 70):
            codes.append(
                Engine(batch).generate(
                    conditions(dim=32, tokens=tokens), prompt=None, length=260, sampling=SamplingParams(),
                    generator=torch.Generator().manual_seed(0),
                )
            )  # fmt: skip
    assert keys["on"] == {ActiveExtent(1, 2048, 512)}
    assert keys["off"] == {
        ActiveExtent(1, 256, 64),
        ActiveExtent(1, 512, 64),
        ActiveExtent(1, 256, 128),
        ActiveExtent(1, 512, 128),
    }
    assert torch.equal(codes[0], codes[2]) and torch.equal(codes[1], codes[3])
