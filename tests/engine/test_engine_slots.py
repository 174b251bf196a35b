"""What a slot generates does not depend on the others, whoever joins, leaves, fails or waits."""

import threading
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from _random_models import Conditions, conditions, language_model
from torch import Tensor, nn

from musicgen_svc.compat import LMModel
from musicgen_svc.engine.engine import Engine, Slot
from musicgen_svc.engine.turns import Turns
from musicgen_svc.errors import WeightsError
from musicgen_svc.request import SamplingParams
from musicgen_svc.ticks import Tick, no_tick

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

    def open_in(self, engine: Engine) -> Slot:
        return engine.open(
            self.given, prompt=self.prompt, length=self.length, sampling=self.sampling,
            generator=self._generator(),
        )  # fmt: skip

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


def alone(ask: Ask, kind: str = "text") -> Tensor:
    return ask.generate_in(Engine(model(kind)))


def finish(engine: Engine, slot: Slot) -> Tensor:
    while not slot.done:
        engine.step()
    return slot.codes


@pytest.mark.parametrize("kind", ["text", "melody"])
def test_requests_together_are_what_they_are_alone(kind: str) -> None:
    engine = Engine(model(kind), slots=4)
    slots = [ask.open_in(engine) for ask in asks(kind)]
    for ask, slot in zip(asks(kind), slots, strict=True):
        assert torch.equal(finish(engine, slot), alone(ask, kind))


def test_a_slot_that_joins_at_step_100_of_another() -> None:
    long = Ask(conditions(seed=8), 150, seed=5)
    engine = Engine(model(), slots=2)
    first = long.open_in(engine)
    while first.progress[0] < 100:
        engine.step()
    second = asks()[1].open_in(engine)
    assert torch.equal(finish(engine, second), alone(asks()[1]))
    assert torch.equal(finish(engine, first), alone(long))


def test_a_slot_that_leaves_does_not_disturb_the_rest() -> None:
    engine = Engine(model(), slots=3)
    slots = [ask.open_in(engine) for ask in asks()[:3]]
    for _ in range(10):
        engine.step()
    engine.close(slots[0])
    stopped = slots[0].filled
    assert torch.equal(finish(engine, slots[2]), alone(asks()[2]))
    assert slots[0].filled == stopped


def test_threads_share_an_engine_with_fewer_slots_than_requests() -> None:
    engine = Engine(model(), slots=2)
    results: dict[int, Tensor] = {}
    together: set[int] = set()

    def run(index: int, ask: Ask) -> None:
        results[index] = ask.generate_in(engine, lambda done, total: together.add(len(engine._open)))

    threads = [threading.Thread(target=run, args=item) for item in enumerate(asks())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, ask in enumerate(asks()):
        assert torch.equal(results[index], alone(ask))
    assert max(together) == 2, "two at once, and no more"


def test_a_tick_that_raises_ends_its_request_and_frees_its_place() -> None:
    engine = Engine(model(), slots=1)

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
        assert not engine._open
    assert torch.equal(asks()[0].generate_in(engine), alone(asks()[0]))


def test_progress_rises_to_its_total() -> None:
    ticks: list[tuple[int, int]] = []
    ask = asks()[1]
    ask.generate_in(Engine(model()), lambda done, total: ticks.append((done, total)))
    assert ask.prompt is not None
    total = ask.length - ask.prompt.shape[1] + 3
    assert {of for _, of in ticks} == {total}
    assert ticks == sorted(ticks) and ticks[0][0] == 0 and ticks[-1][0] == total


def test_a_step_that_failed_can_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model())
    slot = asks()[0].open_in(engine)
    engine.step()
    head = engine.decoder._logits
    monkeypatch.setattr(engine.decoder, "_logits", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.step()
    monkeypatch.setattr(engine.decoder, "_logits", head)
    assert torch.equal(finish(engine, slot), alone(asks()[0]))


def test_the_weights_are_the_models_own() -> None:
    lm = language_model(card=CARD)
    own = {p.untyped_storage().data_ptr() for p in lm.parameters()}
    before = lm(torch.zeros(2, 4, 3, dtype=torch.long), [], conditions())
    engine = Engine(lm)
    after = lm(torch.zeros(2, 4, 3, dtype=torch.long), [], conditions())
    assert torch.equal(before, after)
    heads = {linear.weight.untyped_storage().data_ptr() for linear in lm.linears}
    assert len(heads) == 1, "merged once, not copied"
    Engine(lm)
    assert heads == {linear.weight.untyped_storage().data_ptr() for linear in lm.linears}
    assert torch.equal(before, lm(torch.zeros(2, 4, 3, dtype=torch.long), [], conditions()))
    shared = {p.untyped_storage().data_ptr() for p in lm.parameters()} - heads
    assert shared <= own and engine.decoder.weights.data_ptr() == lm.emb[0].weight.data_ptr()


def test_another_architecture_is_refused_by_name() -> None:
    lm = language_model(card=CARD)
    lm.transformer.positional_embedding = "rope"
    with pytest.raises(WeightsError, match="sinusoidal positions"):
        Engine(lm)
    lm = language_model(card=CARD)
    lm.linears[0] = nn.Linear(64, CARD, bias=True)
    with pytest.raises(WeightsError, match="without biases"):
        Engine(lm)


def test_turns_come_in_the_order_of_asking_and_can_be_given_up() -> None:
    turns = Turns(1)
    order: list[str] = []
    holding, release = threading.Event(), threading.Event()

    def hold() -> None:
        with turns.taken(lambda: None):
            holding.set()
            release.wait()

    def give_up() -> None:
        raise TimeoutError

    def queue(name: str) -> threading.Thread:
        def run() -> None:
            with turns.taken(lambda: None):
                order.append(name)

        before = len(turns._queue)
        thread = threading.Thread(target=run)
        thread.start()
        while len(turns._queue) == before:
            pass
        return thread

    holder = threading.Thread(target=hold)
    holder.start()
    holding.wait()
    first = queue("first")
    with pytest.raises(TimeoutError), turns.taken(give_up):
        pytest.fail("a turn that was never free")
    second = queue("second")
    release.set()
    for thread in (holder, first, second):
        thread.join()
    assert order == ["first", "second"] and not turns._queue
