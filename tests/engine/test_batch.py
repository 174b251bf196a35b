"""The tokens of a slot do not depend on the other slots, whenever they open, close or fail."""

from typing import Any

import pytest
import torch
from request_specs import RequestSpec, alone, finish, model, request_specs
from torch import Tensor

from benchmarks.random_models import conditions
from musicgen_svc.engine.factory import batch_for
from musicgen_svc.engine.sampling_params import SamplingParams


@pytest.mark.parametrize("kind", ["text", "melody"])
def test_requests_together_get_the_tokens_that_each_gets_alone(kind: str) -> None:
    batch = batch_for(model(kind), slots=4)
    slots = [spec.open_in(batch) for spec in request_specs(kind)]
    for spec, slot in zip(request_specs(kind), slots, strict=True):
        assert torch.equal(finish(batch, slot), alone(spec, kind))


def test_a_slot_may_open_at_step_100_of_another() -> None:
    long = RequestSpec(conditions(seed=8), 150, seed=5)
    batch = batch_for(model(), slots=2)
    first = long.open_in(batch)
    while first.progress[0] < 100:
        batch.step()
    second = request_specs()[1].open_in(batch)
    assert torch.equal(finish(batch, second), alone(request_specs()[1]))
    assert torch.equal(finish(batch, first), alone(long))


def test_a_slot_that_closes_early_does_not_change_the_others() -> None:
    batch = batch_for(model(), slots=3)
    slots = [spec.open_in(batch) for spec in request_specs()[:3]]
    for _ in range(10):
        batch.step()
    batch.close(slots[0])
    stopped = slots[0].filled
    assert torch.equal(finish(batch, slots[2]), alone(request_specs()[2]))
    assert slots[0].filled == stopped


def test_a_step_that_failed_can_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batch_for(model())
    slot = request_specs()[0].open_in(batch)
    batch.step()
    logits = batch.decoder.logits

    def fail_at_its_end(*args: Any) -> Tensor:
        logits(*args)  # has written to the cache
        raise RuntimeError("at the end of the forward pass")

    with monkeypatch.context() as patch:
        patch.setattr(batch.decoder, "logits", fail_at_its_end)
        with pytest.raises(RuntimeError, match="at the end"):
            batch.step()
    assert torch.equal(finish(batch, slot), alone(request_specs()[0]))


def test_a_draw_that_fails_ends_its_own_request_only() -> None:
    batch = batch_for(model(), slots=3)
    slots = [spec.open_in(batch) for spec in request_specs()[:3]]
    slots[1].sampling = SamplingParams(temperature=float("nan"))  # makes all probabilities NaN
    for _ in range(3):
        batch.step()
    assert isinstance(slots[1].error, RuntimeError) and slots[1].filled == slots[1].start + 1
    for slot, spec in ((slots[0], request_specs()[0]), (slots[2], request_specs()[2])):
        assert torch.equal(finish(batch, slot), alone(spec))
