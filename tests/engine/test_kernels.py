"""The kernels give the results of the plain operations, on a GPU and on a CPU with Triton's interpreter."""

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
from kernel_checks import CHECKS

from benchmarks.random_models import conditions, language_model
from musicgen_svc.engine import factory
from musicgen_svc.engine.engine import Engine
from musicgen_svc.engine.factory import Switch, batch_for, kernels_that_work, operations_for
from musicgen_svc.engine.operations import PLAIN, Operations, PlainOperations
from musicgen_svc.engine.sampling_params import SamplingParams
from musicgen_svc.engine.selftest import Shape
from musicgen_svc.engine.state import ActiveExtent, DeviceState

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
    """Runs a program of checks, whose compiled kernels go into the folder.

    Returns:
        dict: the failure of each check by name, None for a check that passed.
    """
    ran = subprocess.run(
        [sys.executable, "-W", "error", HERE / name], capture_output=True, text=True, timeout=280,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(folder)} | environment,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return dict(json.loads(line) for line in ran.stdout.splitlines())


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    pytest.importorskip("triton")
    return program(
        "kernel_checks.py", tmp_path_factory.mktemp("triton"), TRITON_INTERPRET="1", OMP_NUM_THREADS="1"
    )


@pytest.mark.parametrize("check", CHECKS)
def test_interpreted_kernels_give_the_plain_results(check: str, interpreted: dict[str, str | None]) -> None:
    failure = interpreted[check]
    assert failure is None, failure


def test_kernels_compile_for_an_h200_without_one(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    found = program("kernel_builds.py", tmp_path, TRITON_INTERPRET="0")
    failures = [f"{name}: {failure}" for name, failure in found.items() if failure is not None]
    assert len(found) == 9 and not failures, "\n".join(failures)


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("check", CHECKS)
def test_kernels_on_a_gpu_give_the_plain_results(check: str) -> None:
    with torch.inference_mode():
        CHECKS[check](torch.device("cuda"))


# --- which operations the factory chooses --------------------------------------------------------


def test_plain_operations_are_chosen_on_a_cpu() -> None:
    assert operations_for(language_model(dim=32, layers=1, heads=2)) is PLAIN


def test_kernels_are_off_if_they_are_switched_off_or_the_batch_is_ragged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lm = language_model(dim=32, layers=1, heads=2)
    monkeypatch.setattr(factory, "load_kernels", lambda: BY_LENGTH)
    assert batch_for(lm, batch_kind="static", kernels="on").decoder.operations is BY_LENGTH
    assert batch_for(lm, batch_kind="static", kernels="off").decoder.operations is PLAIN
    assert batch_for(lm, batch_kind="ragged", kernels="on").decoder.operations is PLAIN


def _raise(exc: Exception) -> Operations:
    raise exc


@pytest.mark.parametrize(
    ("kernels", "reason"),
    [
        (partial(_raise, ImportError("No module named 'triton'")), "No module named 'triton'"),
        (partial(_raise, RuntimeError("Failed to find C compiler.")), "Failed to find C compiler."),
        (lambda: altered(draw=lambda *given: PLAIN.draw(*given) + 1), "other tokens are drawn"),
    ],
)
def test_kernels_that_do_not_work_are_not_used(
    kernels: Callable[[], Operations],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(factory, "load_kernels", kernels)
    with caplog.at_level(logging.WARNING):
        assert kernels_that_work(SHAPE, CPU) is PLAIN
    assert reason in caplog.text


def test_kernels_that_agree_with_the_plain_operations_are_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(factory, "load_kernels", lambda: BY_LENGTH)
    assert kernels_that_work(SHAPE, CPU) is BY_LENGTH
    assert not caplog.text


def test_with_kernels_all_positions_and_texts_share_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factory, "load_kernels", lambda: BY_LENGTH)
    lm = language_model(dim=32, layers=1, heads=2, card=40)
    extents: dict[Switch, set[ActiveExtent]] = {"on": set(), "off": set()}
    codes = []
    compute = DeviceState.step
    for kernels, seen in extents.items():
        batch = batch_for(lm, slots=2, batch_kind="static", kernels=kernels)
        monkeypatch.setattr(
            DeviceState, "step", lambda state, extent, seen=seen: (seen.add(extent), compute(state, extent))
        )
        for tokens in (5, 70):
            codes.append(
                Engine(batch).generate(
                    conditions(dim=32, tokens=tokens), prompt=None, length=260, sampling=SamplingParams(),
                    generator=torch.Generator().manual_seed(0),
                )
            )  # fmt: skip
    assert extents["on"] == {ActiveExtent(1, 2048, 512)}
    assert extents["off"] == {
        ActiveExtent(1, 256, 64),
        ActiveExtent(1, 512, 64),
        ActiveExtent(1, 256, 128),
        ActiveExtent(1, 512, 128),
    }
    assert torch.equal(codes[0], codes[2]) and torch.equal(codes[1], codes[3])
