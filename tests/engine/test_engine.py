"""Threads share an engine: queueing, errors, cancels and progress."""

import threading
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from request_specs import RequestSpec, alone, finish, model, request_specs
from torch import Tensor

from benchmarks.random_models import conditions
from musicgen_svc.engine.engine import Engine, StepError
from musicgen_svc.engine.factory import BatchKind, batch_for
from musicgen_svc.engine.sampling_params import SamplingParams
from musicgen_svc.engine.static import StaticBatch
from musicgen_svc.runtime.ticks import Tick


def test_threads_share_an_engine_with_fewer_slots_than_requests() -> None:
    engine = Engine(batch_for(model(), slots=2))
    results: dict[int, Tensor] = {}
    together: set[int] = set()

    def run(index: int, spec: RequestSpec) -> None:
        results[index] = spec.generate_in(engine, lambda done, total: together.add(len(engine.batch.slots)))

    threads = [threading.Thread(target=run, args=item) for item in enumerate(request_specs())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, spec in enumerate(request_specs()):
        assert torch.equal(results[index], alone(spec))
    assert max(together) == 2, "two requests at once, and no more"


def test_a_tick_that_raises_ends_its_request_and_frees_its_slot() -> None:
    engine = Engine(batch_for(model()))

    class CancelledError(Exception):
        pass

    def cancel_at(limit: int) -> Tick:
        def tick(done: int, total: int) -> None:
            if done >= limit:
                raise CancelledError

        return tick

    for limit in (0, 1):  # 0: in the prefill, 1: between steps
        with pytest.raises(CancelledError):
            request_specs()[0].generate_in(engine, cancel_at(limit))
        assert not engine.batch.slots
    assert torch.equal(request_specs()[0].generate_in(engine), alone(request_specs()[0]))


def test_progress_rises_to_its_total() -> None:
    ticks: list[tuple[int, int]] = []
    spec = request_specs()[1]
    spec.generate_in(Engine(batch_for(model())), lambda done, total: ticks.append((done, total)))
    assert spec.prompt is not None
    total = spec.length - spec.prompt.shape[1] + 3
    assert {of for _, of in ticks} == {total}
    assert ticks == sorted(ticks) and ticks[0][0] == 0 and ticks[-1][0] == total


def together(engine: Engine, asked: list[RequestSpec]) -> list[Any]:
    """The tokens or the exception of each request. All threads have a slot before the first one steps."""
    results: list[Any] = [None] * len(asked)
    all_in = threading.Barrier(len(asked))
    deadline_s = time.monotonic() + 30

    def run(index: int, spec: RequestSpec) -> None:
        waited = False

        def tick(done: int, total: int) -> None:
            nonlocal waited
            if time.monotonic() > deadline_s:
                raise TimeoutError
            if done and not waited:  # the slot is open, as the first column has been drawn
                waited = True
                all_in.wait(20)

        try:
            results[index] = spec.generate_in(engine, tick)
        except Exception as exc:
            results[index] = exc

    threads = [threading.Thread(target=run, args=item) for item in enumerate(asked)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("batch_kind", ["ragged", "static"])
def test_a_shared_step_that_fails_ends_all_requests_in_it_and_the_engine_serves_the_next_ones(
    batch_kind: BatchKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(batch_for(model(), slots=3, batch_kind=batch_kind))
    compute, steps = engine.decoder.logits, 0

    def fail_at_the_fifth(tokens: Tensor, *rest: Any) -> Tensor:
        nonlocal steps
        steps += len(rest) == 2  # a prefill also gives a prefix and a check
        if steps == 5:
            raise torch.OutOfMemoryError("in the fifth step")
        return compute(tokens, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(engine.decoder, "logits", fail_at_the_fifth)
        for end in together(engine, request_specs()[:3]):
            assert isinstance(end, StepError) and isinstance(end.__cause__, torch.OutOfMemoryError), end
    assert steps == 5 and not engine.batch.slots
    for got, spec in zip(together(engine, request_specs()[:3]), request_specs(), strict=False):
        assert torch.equal(got, alone(spec, batch_kind=batch_kind))


def test_a_prefill_that_fails_ends_its_own_request_only() -> None:
    engine = Engine(batch_for(model(), slots=2))
    other = request_specs()[0].open_in(engine.batch)
    with pytest.raises(RuntimeError, match="probability"):
        replace(request_specs()[1], sampling=SamplingParams(temperature=float("nan"))).generate_in(engine)
    assert engine.batch.slots == [other]
    assert torch.equal(finish(engine.batch, other), alone(request_specs()[0]))


def test_a_long_prefill_lets_others_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns last no time here, so the prefill yields the device at each of its checks."""
    monkeypatch.setattr("musicgen_svc.runtime.fair_queue.TURN_S", 0.0)
    monkeypatch.setattr("musicgen_svc.engine.engine.TURN_S", 0.01)
    engine = Engine(batch_for(model(), slots=2))
    first = replace(request_specs()[0], length=400)
    seen: list[int] = []
    started = threading.Event()

    def note_start(done: int, total: int) -> None:
        if done:
            started.set()

    thread = threading.Thread(target=first.generate_in, args=(engine, note_start))
    thread.start()
    started.wait()

    def tick(done: int, total: int) -> None:
        if done == 0 and engine.batch.slots:
            seen.append(engine.batch.slots[0].filled)

    assert torch.equal(request_specs()[1].generate_in(engine, tick), alone(request_specs()[1]))
    thread.join()
    assert len(set(seen)) > 2, "the other request was stepped between the checks of the prefill"


def test_a_request_for_larger_buffers_waits_until_no_slot_is_open_and_later_requests_wait_behind_it() -> None:
    batch = batch_for(model(), slots=3, batch_kind="static")
    engine = Engine(batch)
    wide = RequestSpec(conditions(tokens=600), 30, sampling=SamplingParams(temperature=0))
    order: list[str] = []
    results: dict[str, Tensor] = {}
    threads = []
    all_in_queue = threading.Event()

    def start(name: str, spec: RequestSpec) -> None:
        """Starts a thread, and waits until its request is in the queue for a slot."""
        in_queue = threading.Event()

        def tick(done: int, total: int) -> None:
            in_queue.set()
            if done and name not in order:
                order.append(name)
            if done and name == "first":
                assert all_in_queue.wait(60)

        def run() -> None:
            results[name] = spec.generate_in(engine, tick)

        threads.append(threading.Thread(target=run))
        threads[-1].start()
        assert in_queue.wait(60)

    start("first", replace(request_specs()[0], length=600))
    start("wide", wide)
    start("later", request_specs()[1])
    all_in_queue.set()
    for thread in threads:
        thread.join()
    assert order == ["first", "wide", "later"]
    assert torch.equal(results["wide"], alone(wide))
    assert torch.equal(results["later"], alone(request_specs()[1], batch_kind="static"))
    assert isinstance(batch, StaticBatch) and batch.state.capacity.text >= 600
