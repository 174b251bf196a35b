"""What a slot generates does not depend on the others, whoever joins, leaves, fails or waits."""

import threading
import time
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.random_models import Conditions, conditions, language_model
from musicgen_svc.audiocraft_compat import LMModel
from musicgen_svc.engine import static
from musicgen_svc.engine.batch import Batch, DecodeRequest, Slot
from musicgen_svc.engine.decoder import Decoder
from musicgen_svc.engine.engine import Engine, StepError
from musicgen_svc.engine.factory import BatchKind, batch_for
from musicgen_svc.engine.sampling_params import SamplingParams
from musicgen_svc.engine.state import Capacity, DeviceState
from musicgen_svc.engine.static import StaticBatch
from musicgen_svc.errors import WeightsError
from musicgen_svc.runtime.ticks import Tick, no_tick

CARD = 300
DEFAULT = SamplingParams()


@cache
def model(kind: str = "text") -> LMModel:
    return language_model(kind, card=CARD)


@dataclass(frozen=True)
class Ask:
    given: Conditions
    length: int
    prompt: Tensor | None = None
    sampling: SamplingParams = DEFAULT
    seed: int = 0

    def open_in(self, batch: Batch) -> Slot:
        return batch.open(
            DecodeRequest(self.given, self.prompt, self.length, self.sampling, self._generator())
        )

    def generate_in(self, engine: Engine, tick: Tick = no_tick) -> Tensor:
        return engine.generate(
            self.given, prompt=self.prompt, length=self.length, sampling=self.sampling,
            generator=self._generator(), tick=tick,
        )  # fmt: skip

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


def asks(kind: str = "text") -> list[Ask]:
    """Different prompts, texts, lengths, seeds, parameters, and numbers of rows."""
    prompt = torch.randint(CARD, (4, 20), generator=torch.Generator().manual_seed(1))
    one, two, three = (conditions(kind, seed=s, tokens=4 + 3 * s, chroma=9 + s) for s in range(3))
    null = {name: (tensor[1:].repeat(2, 1, 1), mask) for name, (tensor, mask) in three.items()}
    return [
        Ask(one, 60, seed=1),
        Ask(two, 45, prompt, SamplingParams(temperature=0, guidance=7), seed=2),
        Ask(three, 50, None, SamplingParams(top_p=0.9, guidance=1, temperature=1.3), seed=3),
        Ask(null, 40, None, SamplingParams(top_k=10), seed=4),
    ]


def alone(ask: Ask, kind: str = "text", batch_kind: BatchKind = "auto") -> Tensor:
    return ask.generate_in(Engine(batch_for(model(kind), kind=batch_kind)))


def finish(batch: Batch, slot: Slot) -> Tensor:
    while not slot.done:
        batch.step()
    return slot.codes


@pytest.mark.parametrize("kind", ["text", "melody"])
def test_requests_together_are_what_they_are_alone(kind: str) -> None:
    batch = batch_for(model(kind), slots=4)
    slots = [ask.open_in(batch) for ask in asks(kind)]
    for ask, slot in zip(asks(kind), slots, strict=True):
        assert torch.equal(finish(batch, slot), alone(ask, kind))


def test_a_slot_that_joins_at_step_100_of_another() -> None:
    long = Ask(conditions(seed=8), 150, seed=5)
    batch = batch_for(model(), slots=2)
    first = long.open_in(batch)
    while first.progress[0] < 100:
        batch.step()
    second = asks()[1].open_in(batch)
    assert torch.equal(finish(batch, second), alone(asks()[1]))
    assert torch.equal(finish(batch, first), alone(long))


def test_a_slot_that_leaves_does_not_disturb_the_rest() -> None:
    batch = batch_for(model(), slots=3)
    slots = [ask.open_in(batch) for ask in asks()[:3]]
    for _ in range(10):
        batch.step()
    batch.close(slots[0])
    stopped = slots[0].filled
    assert torch.equal(finish(batch, slots[2]), alone(asks()[2]))
    assert slots[0].filled == stopped


def test_threads_share_an_engine_with_fewer_slots_than_requests() -> None:
    engine = Engine(batch_for(model(), slots=2))
    results: dict[int, Tensor] = {}
    together: set[int] = set()

    def run(index: int, ask: Ask) -> None:
        results[index] = ask.generate_in(engine, lambda done, total: together.add(len(engine.batch.slots)))

    threads = [threading.Thread(target=run, args=item) for item in enumerate(asks())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, ask in enumerate(asks()):
        assert torch.equal(results[index], alone(ask))
    assert max(together) == 2, "two at once, and no more"


def test_a_tick_that_raises_ends_its_request_and_frees_its_place() -> None:
    engine = Engine(batch_for(model()))

    class CancelledError(Exception):
        pass

    def cancel_at(limit: int) -> Tick:
        def tick(done: int, total: int) -> None:
            if done >= limit:
                raise CancelledError

        return tick

    for limit in (0, 1):  # in the prefill, then between steps
        with pytest.raises(CancelledError):
            asks()[0].generate_in(engine, cancel_at(limit))
        assert not engine.batch.slots
    assert torch.equal(asks()[0].generate_in(engine), alone(asks()[0]))


def test_progress_rises_to_its_total() -> None:
    ticks: list[tuple[int, int]] = []
    ask = asks()[1]
    ask.generate_in(Engine(batch_for(model())), lambda done, total: ticks.append((done, total)))
    assert ask.prompt is not None
    total = ask.length - ask.prompt.shape[1] + 3
    assert {of for _, of in ticks} == {total}
    assert ticks == sorted(ticks) and ticks[0][0] == 0 and ticks[-1][0] == total


def test_a_step_that_failed_can_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batch_for(model())
    slot = asks()[0].open_in(batch)
    batch.step()
    head = batch.decoder._logits
    monkeypatch.setattr(batch.decoder, "_logits", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        batch.step()
    monkeypatch.setattr(batch.decoder, "_logits", head)
    assert torch.equal(finish(batch, slot), alone(asks()[0]))


def test_the_weights_are_the_models_own() -> None:
    lm = language_model(card=CARD)
    own = {p.untyped_storage().data_ptr() for p in lm.parameters()}
    before = lm(torch.zeros(2, 4, 3, dtype=torch.long), [], conditions())
    decoder = batch_for(lm).decoder
    after = lm(torch.zeros(2, 4, 3, dtype=torch.long), [], conditions())
    assert torch.equal(before, after)
    heads = {linear.weight.untyped_storage().data_ptr() for linear in lm.linears}
    assert len(heads) == 1, "merged once, not copied"
    batch_for(lm)
    assert heads == {linear.weight.untyped_storage().data_ptr() for linear in lm.linears}
    assert torch.equal(before, lm(torch.zeros(2, 4, 3, dtype=torch.long), [], conditions()))
    shared = {p.untyped_storage().data_ptr() for p in lm.parameters()} - heads
    assert shared <= own and decoder.weights.data_ptr() == lm.emb[0].weight.data_ptr()


def test_another_architecture_is_refused_by_name() -> None:
    lm = language_model(card=CARD)
    lm.transformer.positional_embedding = "rope"
    with pytest.raises(WeightsError, match="sinusoidal positions"):
        batch_for(lm)
    lm = language_model(card=CARD)
    lm.linears[0] = nn.Linear(64, CARD, bias=True)
    with pytest.raises(WeightsError, match="without biases"):
        batch_for(lm)


def together(engine: Engine, asked: list[Ask]) -> list[Any]:
    """What each gets, tokens or an exception, from threads that are all in before the first one steps."""
    results: list[Any] = [None] * len(asked)
    all_in = threading.Barrier(len(asked))
    deadline_s = time.monotonic() + 30

    def run(index: int, ask: Ask) -> None:
        waited = False

        def tick(done: int, total: int) -> None:
            nonlocal waited
            if time.monotonic() > deadline_s:
                raise TimeoutError
            if done and not waited:  # the prefill has drawn the first column
                waited = True
                all_in.wait(20)

        try:
            results[index] = ask.generate_in(engine, tick)
        except Exception as exc:
            results[index] = exc

    threads = [threading.Thread(target=run, args=item) for item in enumerate(asked)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("batch_kind", ["ragged", "static"])
def test_a_shared_step_that_fails_ends_all_that_are_in_it_and_leaves_the_engine_whole(
    batch_kind: BatchKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(batch_for(model(), slots=3, kind=batch_kind))
    compute, steps = engine.decoder.logits, 0

    def fail_at_the_fifth(tokens: Tensor, *rest: Any) -> Tensor:
        nonlocal steps
        steps += len(rest) == 2  # a prefill has a prefix and a pulse, too
        if steps == 5:
            raise torch.OutOfMemoryError("in the middle of it")
        return compute(tokens, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(engine.decoder, "logits", fail_at_the_fifth)
        for end in together(engine, asks()[:3]):
            assert isinstance(end, StepError) and isinstance(end.__cause__, torch.OutOfMemoryError), end
    assert steps == 5 and not engine.batch.slots
    for got, ask in zip(together(engine, asks()[:3]), asks(), strict=False):
        assert torch.equal(got, alone(ask, batch_kind=batch_kind))


def test_a_draw_that_fails_is_one_requests_own_error() -> None:
    batch = batch_for(model(), slots=3)
    slots = [ask.open_in(batch) for ask in asks()[:3]]
    slots[1].sampling = SamplingParams(temperature=float("nan"))  # no logits survive it
    for _ in range(3):
        batch.step()
    assert isinstance(slots[1].error, RuntimeError) and slots[1].filled == slots[1].start + 1
    for slot, ask in ((slots[0], asks()[0]), (slots[2], asks()[2])):
        assert torch.equal(finish(batch, slot), alone(ask))


def test_a_prefill_that_fails_is_one_requests_own_error() -> None:
    engine = Engine(batch_for(model(), slots=2))
    other = asks()[0].open_in(engine.batch)
    with pytest.raises(RuntimeError, match="probability"):
        replace(asks()[1], sampling=SamplingParams(temperature=float("nan"))).generate_in(engine)
    assert engine.batch.slots == [other]
    assert torch.equal(finish(engine.batch, other), alone(asks()[0]))


def test_a_long_prefill_lets_others_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every turn is over at once: the prefill is laid aside at each of its pulses."""
    monkeypatch.setattr("musicgen_svc.runtime.fair_queue.TURN_S", 0.0)
    monkeypatch.setattr("musicgen_svc.engine.engine.TURN_S", 0.01)
    engine = Engine(batch_for(model(), slots=2))
    first = replace(asks()[0], length=400)
    seen: list[int] = []
    started = threading.Event()

    def tell(done: int, total: int) -> None:
        if done:
            started.set()

    thread = threading.Thread(target=first.generate_in, args=(engine, tell))
    thread.start()
    started.wait()

    def tick(done: int, total: int) -> None:
        if done == 0 and engine.batch.slots:
            seen.append(engine.batch.slots[0].filled)

    assert torch.equal(asks()[1].generate_in(engine, tick), alone(asks()[1]))
    thread.join()
    assert len(set(seen)) > 2, "the other one went on between the pulses of the prefill"


def test_a_request_for_longer_buffers_waits_until_they_are_empty_and_later_ones_behind_it() -> None:
    batch = batch_for(model(), slots=3, kind="static")
    engine = Engine(batch)
    wide = Ask(conditions(tokens=600), 30, sampling=SamplingParams(temperature=0))
    order: list[str] = []
    results: dict[str, Tensor] = {}
    threads = []

    def start(name: str, ask: Ask, in_queue: int) -> None:
        def tick(done: int, total: int) -> None:
            if done and name not in order:
                order.append(name)
            if name == "first" and engine._slot_queue.length < 3:
                time.sleep(0.05)  # it is not done before the others have come

        def run() -> None:
            results[name] = ask.generate_in(engine, tick)

        threads.append(threading.Thread(target=run))
        threads[-1].start()
        while engine._slot_queue.length < in_queue:
            pass

    start("first", replace(asks()[0], length=600), 1)
    start("wide", wide, 2)
    start("later", asks()[1], 3)
    for thread in threads:
        thread.join()
    assert order == ["first", "wide", "later"]
    assert torch.equal(results["wide"], alone(wide))
    assert torch.equal(results["later"], alone(asks()[1], batch_kind="static"))
    assert isinstance(batch, StaticBatch) and batch.state.capacity.text >= 600


def test_buffers_that_could_not_grow_are_there_for_the_next_request(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batch_for(model(), slots=2, kind="static")
    assert isinstance(batch, StaticBatch)

    def scarce(decoder: Decoder, capacity: Capacity) -> DeviceState:
        if capacity.text > 512:
            raise torch.OutOfMemoryError("of the buffers")
        return DeviceState(decoder, capacity)

    monkeypatch.setattr(static, "DeviceState", scarce)
    with pytest.raises(torch.OutOfMemoryError):
        Ask(conditions(tokens=600), 30).generate_in(Engine(batch))
    assert batch.state.keys.numel() == 0, "old buffers and new ones at once may not fit"
    assert torch.equal(asks()[1].generate_in(Engine(batch)), alone(asks()[1], batch_kind="static"))
    assert batch.state.capacity == Capacity(2)
