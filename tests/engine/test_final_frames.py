"""An engine reports the frames of a request while it decodes it, and does nothing for requests without it."""

import threading
from dataclasses import replace

import pytest
import torch
from request_specs import RequestSpec, alone, model, request_specs
from torch import Tensor

from musicgen_svc.engine.batch import Slot
from musicgen_svc.engine.engine import Engine
from musicgen_svc.engine.factory import BatchKind, batch_for
from musicgen_svc.runtime.fair_queue import FairQueue

KINDS: list[BatchKind] = ["ragged", "static"]


def prompt_frames(spec: RequestSpec) -> int:
    return 0 if spec.prompt is None else spec.prompt.shape[1]


@pytest.mark.parametrize("batch_kind", KINDS)
def test_the_reported_frames_joined_are_the_tokens_after_the_prompt(batch_kind: BatchKind) -> None:
    """All requests run together, so that other threads step a request too."""
    engine = Engine(batch_for(model(), slots=4, batch_kind=batch_kind))
    specs = request_specs()
    reported: list[list[Tensor]] = [[] for _ in specs]
    results: dict[int, Tensor] = {}

    def run(index: int) -> None:
        results[index] = specs[index].generate_in(engine, on_frames=reported[index].append)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(specs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, spec in enumerate(specs):
        assert torch.equal(results[index], alone(spec, batch_kind=batch_kind))
        assert torch.equal(torch.cat(reported[index], 1), results[index][:, prompt_frames(spec) :])


@pytest.mark.parametrize("batch_kind", KINDS)
def test_frames_are_reported_while_the_request_is_decoded(
    batch_kind: BatchKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("musicgen_svc.engine.engine.TURN_S", 0.02)
    engine = Engine(batch_for(model(), batch_kind=batch_kind))
    spec, drawn, seen = replace(request_specs()[0], length=400), 0, []

    def tick(done: int, total: int) -> None:
        nonlocal drawn
        drawn = done

    def on_frames(tokens: Tensor) -> None:
        (slot,) = engine.batch.slots or (None,)
        seen.append((tokens.shape[1], slot.filled if slot else 0))

    spec.generate_in(engine, tick, on_frames)
    assert len(seen) > 3 and sum(n for n, _ in seen) == 400
    frames = 0
    for n, filled in seen[:-1]:
        frames += n
        assert frames == filled - 1 - max(engine.decoder.delays), "every frame that is final, and no other"
    assert seen[0][0] < 200


def test_the_device_is_free_while_frames_are_reported() -> None:
    device_queue = FairQueue(1)
    engine = Engine(batch_for(model(), slots=2), device_queue)
    done = []

    def on_frames(tokens: Tensor) -> None:
        if not done:  # another request is decoded to its end, and this one with it
            thread = threading.Thread(target=lambda: done.append(other.generate_in(engine)))
            thread.start()
            thread.join(60)
        with device_queue.acquire_next():
            got.append(tokens)

    other, got = replace(request_specs()[2], length=500), []
    spec = replace(request_specs()[0], length=300)
    tokens = spec.generate_in(engine, on_frames=on_frames)
    assert torch.equal(done[0], alone(other))
    assert torch.equal(torch.cat(got, 1), tokens)


def test_a_report_that_raises_ends_its_request_and_frees_its_slot() -> None:
    engine = Engine(batch_for(model()))

    class GoneError(Exception):
        pass

    def gone(tokens: Tensor) -> None:
        raise GoneError

    with pytest.raises(GoneError):
        replace(request_specs()[0], length=300).generate_in(engine, on_frames=gone)
    assert not engine.batch.slots
    assert torch.equal(request_specs()[0].generate_in(engine), alone(request_specs()[0]))


def test_nothing_is_copied_for_a_request_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def copied(slot: Slot, start: int) -> Tensor:
        raise AssertionError("frames were copied")

    monkeypatch.setattr(Slot, "final_frames", copied)
    spec = request_specs()[0]
    engine = Engine(batch_for(model()))
    spec.generate_in(engine)
    with pytest.raises(AssertionError, match="frames were copied"):
        spec.generate_in(engine, on_frames=lambda tokens: None)
