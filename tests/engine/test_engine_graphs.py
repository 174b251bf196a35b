"""The step as it is recorded and replayed, on a GPU of paper: see `paper_graphs.py`."""

import logging
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from paper_gpu import PaperGpu, paper_gpu
from paper_graphs import PaperGraph
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


@cache
def on_a_cpu(name: str) -> LMModel:
    kind, delays = MODELS[name]
    return language_model(kind, delays=delays, dim=32, layers=2, heads=2, card=90, dtype=torch.float16)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PaperGpu]:
    monkeypatch.setattr(static, "CACHE_BUCKET", 8)  # so that a short piece needs several recordings
    for name in MODELS:
        on_a_cpu(name)
    with paper_gpu(monkeypatch) as found:
        yield found


def batch_on(name: str, *, graphs: Switch, slots: int = 2) -> StaticBatch:
    batch = batch_for(on_a_cpu(name).to("cuda"), slots=slots, graphs=graphs, kernels="off")
    assert isinstance(batch, StaticBatch)
    return batch


def request(name: str, length: int, *, seed: int, tokens: int = 5, **sampling: Any) -> DecodeRequest:
    given = conditions(MODELS[name][0], dim=32, seed=seed, tokens=tokens, chroma=9)
    given = {name: (tensor.to("cuda"), mask.to("cuda")) for name, (tensor, mask) in given.items()}
    generator = torch.Generator().manual_seed(seed)
    return DecodeRequest(given, None, length, SamplingParams(**sampling), generator)


def decoded(batch: StaticBatch, name: str) -> list[Tensor]:
    """The tokens of three requests: one joins another later, and one comes into the place of the first."""

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


def test_a_graph_of_paper_is_like_a_real_one(gpu: PaperGpu) -> None:
    """Recording computes nothing, a replay sees what is in memory now, what it made on its way is lost."""
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


@pytest.mark.parametrize("name", MODELS)
def test_a_replayed_step_does_what_a_launched_one_does(name: str, gpu: PaperGpu) -> None:
    recorded, launched = (batch_on(name, graphs=graphs) for graphs in ("on", "off"))
    expected = decoded(launched, name)
    for _ in range(2):
        assert all(map(torch.equal, decoded(recorded, name), expected))
    graphs: dict[Any, Any] = recorded.graphed._graphs
    assert {reach.slots for reach in graphs} == {1, 2} and len({reach.positions for reach in graphs}) > 2
    assert all(graph.replays > 1 for graph in graphs.values()) and not launched.graphed._graphs
    assert all(tokens.unique().numel() > 10 for tokens in expected), "one that repeats itself proves nothing"


def test_recordings_of_buffers_that_are_gone_are_not_replayed(gpu: PaperGpu) -> None:
    recorded, launched = (batch_on("text", graphs=graphs) for graphs in ("on", "off"))
    codes = []
    for batch in (recorded, launched):
        decoded(batch, "text")
        batch.close(batch.open(request("text", 6, seed=4, tokens=600)))  # a text beyond the buffers
        codes.append(decoded(batch, "text"))
    assert all(map(torch.equal, *codes))


# --- what is tried out at load ------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_graphs_that_work_are_kept_and_the_self_test_leaves_no_trace(
    name: str, gpu: PaperGpu, caplog: pytest.LogCaptureFixture
) -> None:
    batch, launched = (batch_on(name, graphs=graphs) for graphs in ("auto", "off"))
    assert batch.graphed.enabled and batch.graphed._graphs
    assert not batch.slots and not gpu.waits_are_errors
    assert all(map(torch.equal, decoded(batch, name), decoded(launched, name)))
    assert not caplog.text


def in_every_step(monkeypatch: pytest.MonkeyPatch, call: Callable[[Tensor], Tensor]) -> None:
    """What a step takes its positions to be goes through `call`."""
    position = DeviceState.position
    monkeypatch.setattr(DeviceState, "position", lambda state: call(position(state)))


@pytest.mark.parametrize("name", MODELS)
def test_a_step_that_takes_its_position_from_the_host_is_launched(
    name: str, gpu: PaperGpu, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Recorded, it would stay at that position."""
    step, position = StaticBatch.step, [0]

    def stepped(batch: StaticBatch) -> None:
        position[0] = batch.slots[0].positions - 1
        step(batch)

    monkeypatch.setattr(StaticBatch, "step", stepped)
    in_every_step(monkeypatch, lambda positions: torch.full_like(positions, position[0]))
    with caplog.at_level(logging.WARNING):
        batch = batch_on(name, graphs="auto")
    assert "a recorded step draws other tokens" in caplog.text
    assert not batch.graphed.enabled and not batch.graphed._graphs and not batch.slots


def test_a_step_that_waits_is_found_before_it_is_recorded(
    gpu: PaperGpu, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    in_every_step(monkeypatch, lambda positions: positions + 0 * int(positions.max()))
    monkeypatch.setattr(torch.cuda, "graph", None)
    with caplog.at_level(logging.WARNING):
        batch = batch_on("text", graphs="auto")
    assert "a step cannot be recorded" in caplog.text and "synchronizing" in caplog.text
    assert not batch.graphed.enabled and not gpu.waits_are_errors
    assert len(decoded(batch, "text")) == 3


def test_a_recording_that_fails_is_said_in_a_sentence(gpu: PaperGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def note(graph: PaperGraph, function: Any) -> Any:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(PaperGraph, "note", note)
    with pytest.raises(GenerationError) as failure:
        batch_on("text", graphs="auto")
    assert str(failure.value) == (
        "This GPU cannot record the decoding step (CUDA error: operation not permitted when stream is "
        "capturing): set MUSICGEN_CUDA_GRAPHS=off."
    )


def test_slots_go_on_after_a_recording_that_failed(gpu: PaperGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later, in a step that they share: with the next one's."""
    batch, launched = (batch_on("text", graphs=graphs) for graphs in ("on", "off"))
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
