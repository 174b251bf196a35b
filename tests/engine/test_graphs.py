"""Replayed steps do what launched steps do. A pretend GPU records them, see `fixtures/pretend_graphs.py`."""

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.random_models import MODELS, conditions, language_model
from musicgen_svc.audiocraft_compat import LMModel
from musicgen_svc.engine import static
from musicgen_svc.engine.batch import DecodeRequest, Slot
from musicgen_svc.engine.factory import Switch, batch_for
from musicgen_svc.engine.sampling_params import SamplingParams
from musicgen_svc.engine.state import DeviceState
from musicgen_svc.engine.static import StaticBatch
from musicgen_svc.errors import GenerationError
from tests.fixtures.pretend_gpu import PretendGpu, pretend_gpu
from tests.fixtures.pretend_graphs import PretendGraph


@cache
def model_on_cpu(name: str) -> LMModel:
    kind, delays = MODELS[name]
    return language_model(kind, delays=delays, dim=32, layers=2, heads=2, card=90, dtype=torch.float16)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendGpu]:
    monkeypatch.setattr(static, "CACHE_BUCKET", 8)  # so that a short piece needs several recordings
    for name in MODELS:
        model_on_cpu(name)
    with pretend_gpu(monkeypatch) as found:
        yield found


def batch_on_gpu(name: str, *, graphs: Switch, slots: int = 2) -> StaticBatch:
    batch = batch_for(model_on_cpu(name).to("cuda"), slots=slots, graphs=graphs, kernels="off")
    assert isinstance(batch, StaticBatch)
    return batch


def request(name: str, length: int, *, seed: int, tokens: int = 5, **sampling: Any) -> DecodeRequest:
    given = conditions(MODELS[name][0], dim=32, seed=seed, tokens=tokens, chroma=9)
    given = {name: (tensor.to("cuda"), mask.to("cuda")) for name, (tensor, mask) in given.items()}
    generator = torch.Generator().manual_seed(seed)
    return DecodeRequest(given, None, length, SamplingParams(**sampling), generator)


def decoded(batch: StaticBatch, name: str) -> list[Tensor]:
    """Decodes three requests: the second opens while the first runs, the third gets the slot of the first."""

    def stepped(*slots: Slot) -> list[Tensor]:
        while any(slot.running for slot in slots):
            batch.step()
        return [slot.codes.cpu() for slot in slots]

    first = batch.open(request(name, 8, seed=1, temperature=0))
    for _ in range(4):
        batch.step()
    second = batch.open(request(name, 14, seed=2, tokens=70))
    found = stepped(first)
    batch.close(first)
    third = batch.open(request(name, 6, seed=3, top_p=0.9))
    found += stepped(second, third)
    for slot in (second, third):
        batch.close(slot)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_a_replayed_step_does_what_a_launched_one_does(name: str, gpu: PretendGpu) -> None:
    recorded, launched = (batch_on_gpu(name, graphs=graphs) for graphs in ("on", "off"))
    expected = decoded(launched, name)
    for _ in range(2):
        assert all(map(torch.equal, decoded(recorded, name), expected))
    graphs: Mapping[Any, Any] = recorded.graphed.recordings
    assert {extent.slots for extent in graphs} == {1, 2} and len({extent.positions for extent in graphs}) > 2
    assert all(graph.replays > 1 for graph in graphs.values()) and not launched.graphed.recordings
    assert all(tokens.unique().numel() > 10 for tokens in expected), (
        "a model that repeats itself proves nothing"
    )


def test_recordings_are_dropped_when_the_buffers_grow(gpu: PretendGpu) -> None:
    recorded, launched = (batch_on_gpu("text", graphs=graphs) for graphs in ("on", "off"))
    codes = []
    for batch in (recorded, launched):
        decoded(batch, "text")
        batch.close(batch.open(request("text", 6, seed=4, tokens=600)))  # its text is longer than the buffers
        codes.append(decoded(batch, "text"))
    assert all(map(torch.equal, *codes))


# --- the self-test at load ----------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_graphs_that_work_are_kept_and_the_self_test_leaves_no_trace(
    name: str, gpu: PretendGpu, caplog: pytest.LogCaptureFixture
) -> None:
    batch, launched = (batch_on_gpu(name, graphs=graphs) for graphs in ("auto", "off"))
    assert batch.graphed.enabled and batch.graphed.recordings
    assert not batch.slots and not gpu.waits_are_errors
    assert all(map(torch.equal, decoded(batch, name), decoded(launched, name)))
    assert "with CUDA graphs" in caplog.messages[0]


def in_every_step(monkeypatch: pytest.MonkeyPatch, call: Callable[[Tensor], Tensor]) -> None:
    """Applies `call` to the positions that a step uses."""
    position = DeviceState.position
    monkeypatch.setattr(DeviceState, "position", lambda state: call(position(state)))


@pytest.mark.parametrize("name", MODELS)
def test_a_step_that_takes_its_position_from_the_host_is_not_recorded(
    name: str, gpu: PretendGpu, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A replay would use the position at which it was recorded."""
    step, position = StaticBatch.step, [0]

    def stepped(batch: StaticBatch) -> None:
        position[0] = batch.slots[0].positions - 1
        step(batch)

    monkeypatch.setattr(StaticBatch, "step", stepped)
    in_every_step(monkeypatch, lambda positions: torch.full_like(positions, position[0]))
    with caplog.at_level(logging.WARNING):
        batch = batch_on_gpu(name, graphs="auto")
    assert "a recorded step draws other tokens" in caplog.text
    assert not batch.graphed.enabled and not batch.graphed.recordings and not batch.slots


def test_a_step_that_waits_is_found_before_it_is_recorded(
    gpu: PretendGpu, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    in_every_step(monkeypatch, lambda positions: positions + 0 * int(positions.max()))
    monkeypatch.setattr(torch.cuda, "graph", None)
    with caplog.at_level(logging.WARNING):
        batch = batch_on_gpu("text", graphs="auto")
    assert "a step cannot be recorded" in caplog.text and "synchronizing" in caplog.text
    assert not batch.graphed.enabled and not gpu.waits_are_errors
    assert len(decoded(batch, "text")) == 3


def test_a_recording_that_fails_at_load_gives_a_sentence(
    gpu: PretendGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    def note(graph: PretendGraph, function: Any) -> Any:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(PretendGraph, "note", note)
    with pytest.raises(GenerationError) as failure:
        batch_on_gpu("text", graphs="auto")
    assert str(failure.value) == (
        "This GPU cannot record the decoding step (CUDA error: operation not permitted when stream is "
        "capturing): set MUSICGEN_CUDA_GRAPHS=off."
    )


def test_slots_can_be_stepped_after_a_recording_that_failed(
    gpu: PretendGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next step records again."""
    batch, launched = (batch_on_gpu("text", graphs=graphs) for graphs in ("on", "off"))
    with monkeypatch.context() as broken:
        slot = batch.open(request("text", 6, seed=1))
        broken.setattr(torch.cuda, "graph", None)
        with pytest.raises(TypeError):
            batch.step()
    other = launched.open(request("text", 6, seed=1))
    for each, own in ((batch, slot), (launched, other)):
        while not own.done:
            each.step()
    assert torch.equal(slot.codes.cpu(), other.codes.cpu())
