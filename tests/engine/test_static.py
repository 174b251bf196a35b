"""A static batch gives the tokens of a ragged one, in any slot and beside any other request.

Most tests run it on a CPU, without graphs. Tests that need a GPU are marked `cuda`.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import torch
from torch import Tensor

from benchmarks.random_models import STEREO, Conditions, conditions, language_model
from musicgen_svc.audiocraft_compat import LMModel
from musicgen_svc.engine import static
from musicgen_svc.engine.batch import Batch, DecodeRequest, Slot
from musicgen_svc.engine.decoder import Decoder
from musicgen_svc.engine.engine import Engine
from musicgen_svc.engine.factory import Switch, batch_for
from musicgen_svc.engine.sampling_params import SamplingParams
from musicgen_svc.engine.state import ActiveExtent, Capacity, DeviceState
from musicgen_svc.engine.static import StaticBatch

CARD = 300
GREEDY = SamplingParams(temperature=0)
DRAWN = SamplingParams(top_k=40, temperature=1.2)


@cache
def model(kind: str, device: str = "cpu") -> LMModel:
    dtype = torch.float16 if device == "cuda" else torch.float32
    delays = STEREO if kind == "text" else (0, 1, 2, 3)
    return language_model(kind, delays=delays, card=CARD, device=device, dtype=dtype)


def given_for(kind: str, seed: int = 0, device: str = "cpu") -> Conditions:
    given = conditions(kind, seed=seed, tokens=4 + seed, chroma=9)
    return {name: (tensor.to(device), mask.to(device)) for name, (tensor, mask) in given.items()}


def opened(
    batch: Batch,
    given: Conditions,
    sampling: SamplingParams,
    *,
    seed: int = 0,
    length: int = 40,
    frames: int = 0,
) -> Slot:
    prompt = torch.arange(batch.decoder.codebooks * frames).view(-1, frames) % CARD if frames else None
    generator = torch.Generator().manual_seed(seed)
    return batch.open(DecodeRequest(given, prompt, length, sampling, generator))


def finished(batch: Batch, slot: Slot) -> Tensor:
    while not slot.done:
        batch.step()
    return slot.codes.cpu()


@pytest.mark.parametrize("kind", ["text", "melody"])
@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("frames", [0, 15])
def test_greedy_tokens_are_those_of_a_ragged_batch(kind: str, guidance: float, frames: int) -> None:
    sampling = SamplingParams(temperature=0, guidance=guidance)
    static, ragged = (batch_for(model(kind), batch_kind=batch_kind) for batch_kind in ("static", "ragged"))
    expected = finished(ragged, opened(ragged, given_for(kind), sampling, frames=frames))
    assert torch.equal(finished(static, opened(static, given_for(kind), sampling, frames=frames)), expected)
    assert expected.unique().numel() > 10, "a model that repeats itself proves nothing"


def test_tokens_do_not_depend_on_the_slot_or_on_other_requests() -> None:
    lm = model("text")
    requests = [
        (given_for("text", s), sampling, s) for s, sampling in enumerate((DRAWN, GREEDY, SamplingParams()))
    ]

    def alone(given: Conditions, sampling: SamplingParams, seed: int) -> Tensor:
        batch = batch_for(lm, batch_kind="static")
        return finished(batch, opened(batch, given, sampling, seed=seed))

    batch = batch_for(lm, slots=3, batch_kind="static")
    first = opened(batch, *requests[0][:2], seed=9, length=60)
    slots = [opened(batch, given, sampling, seed=seed) for given, sampling, seed in requests[1:]]
    for _ in range(10):
        batch.step()
    batch.close(first)  # a later request gets its slot
    late = opened(batch, *requests[0][:2], seed=requests[0][2])
    assert late.index == first.index
    for slot, request in zip([late, *slots], requests, strict=True):
        assert torch.equal(finished(batch, slot), alone(*request))


def test_a_seed_repeats_its_tokens_and_another_seed_draws_others() -> None:
    batch = batch_for(model("melody"), batch_kind="static")

    def run(seed: int) -> Tensor:
        slot = opened(batch, given_for("melody"), DRAWN, seed=seed)
        codes = finished(batch, slot)
        batch.close(slot)
        return codes

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


@pytest.mark.parametrize(
    "extent", [ActiveExtent(*sizes) for sizes in ((1, 256, 64), (2, 256, 64), (4, 512, 64))]
)
def test_a_step_with_all_slots_stopped_changes_no_request(extent: ActiveExtent) -> None:
    """Whether it computes all slots, fewer, or some that are not open."""
    lm = model("text")
    alone = batch_for(lm, batch_kind="static")
    expected = finished(alone, opened(alone, given_for("text"), DRAWN))
    batch = batch_for(lm, slots=4, batch_kind="static")
    assert isinstance(batch, StaticBatch)
    state = batch.state
    done = opened(batch, given_for("text"), DRAWN, length=3)
    slots = [opened(batch, given_for("text"), DRAWN, length=length) for length in (40, 60)]
    while not slots[1].done:
        with torch.inference_mode():
            state.with_all_slots_stopped(lambda: batch.graphed(extent, lambda call: call()))
            assert state.filled[:3].tolist() == [slot.filled for slot in (done, *slots)]
        batch.step()
    assert torch.equal(slots[0].codes, expected)
    assert torch.equal(slots[1].codes[:, :37], expected[:, :37])


def test_a_step_computes_the_leading_slots_that_are_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their number is rounded up to 1, 2, 4 or 8. A request keeps its slot when lower ones are closed."""
    lm = model("text")
    batch = batch_for(lm, slots=6, batch_kind="static")
    rows: list[int] = []
    logits = batch.decoder.logits

    def count(tokens: Tensor, request_of_row: Tensor, *rest: object) -> Tensor:
        rows.append(len(request_of_row))
        return logits(tokens, request_of_row, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(batch.decoder, "logits", count)

    def stepped() -> int:
        batch.step()
        return rows[-1]

    slots = []
    for expected in (1, 2, 4, 4, 6):
        slots.append(opened(batch, given_for("text"), DRAWN, seed=len(slots)))
        assert stepped() == 2 * expected
    for slot in slots[:3]:
        batch.close(slot)
    assert stepped() == 2 * 6
    slots[0] = opened(batch, given_for("text"), GREEDY, length=50)
    assert slots[0].index == 0
    batch.close(slots[4])
    assert stepped() == 2 * 4
    finished(batch, slots[3])
    assert stepped() == 2 * 1, "a slot that is done needs no steps"
    monkeypatch.undo()

    alone = batch_for(lm, batch_kind="static")
    assert torch.equal(slots[3].codes, finished(alone, opened(alone, given_for("text"), DRAWN, seed=3)))
    alone = batch_for(lm, batch_kind="static")
    expected_codes = finished(alone, opened(alone, given_for("text"), GREEDY, length=50))
    assert torch.equal(finished(batch, slots[0]), expected_codes)


def test_a_slot_does_not_keep_the_text_of_its_previous_request() -> None:
    null = {name: (torch.zeros_like(tensor), mask) for name, (tensor, mask) in given_for("text").items()}
    batch = batch_for(model("text"), batch_kind="static")
    batch.close(opened(batch, given_for("text"), GREEDY))
    codes = finished(batch, opened(batch, null, GREEDY))
    fresh = batch_for(model("text"), batch_kind="static")
    assert torch.equal(codes, finished(fresh, opened(fresh, null, GREEDY)))


def test_generate_drives_the_static_batch() -> None:
    batch = batch_for(model("text"), batch_kind="static")
    ticks: list[tuple[int, int]] = []
    codes = Engine(batch).generate(
        given_for("text"), prompt=None, length=40, sampling=DRAWN,
        generator=torch.Generator().manual_seed(0), tick=lambda *at: ticks.append(at),
    )  # fmt: skip
    assert torch.equal(codes, finished(batch, opened(batch, given_for("text"), DRAWN)))
    assert ticks[0] == (0, 43) and ticks[-1] == (43, 43)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("kind", ["text", "melody"])
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
@pytest.mark.parametrize("kernels", ["on", "off"])
def test_replayed_steps_give_the_tokens_of_launched_ones_on_a_gpu(
    kind: str, sampling: SamplingParams, kernels: Switch
) -> None:
    codes = []
    for graphs in ("on", "off"):
        batch = batch_for(model(kind, "cuda"), slots=2, graphs=graphs, kernels=kernels)
        slots = [opened(batch, given_for(kind, s, "cuda"), sampling, seed=s, length=300) for s in range(2)]
        codes.append([finished(batch, slot) for slot in slots])
    for recorded, launched in zip(*codes, strict=True):
        assert torch.equal(recorded, launched)


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("kind", ["text", "melody"])
@pytest.mark.parametrize("kernels", ["on", "off"])
def test_graphs_pass_their_self_test_on_a_gpu(kind: str, kernels: Switch) -> None:
    batch = batch_for(model(kind, "cuda"), graphs="auto", kernels=kernels)
    assert isinstance(batch, StaticBatch) and batch.graphed.enabled


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("kind", ["text", "melody"])
def test_kernels_give_the_tokens_of_the_plain_operations(kind: str) -> None:
    """In fp32, in which sums in another order rarely change a token."""
    lm = language_model(kind, dim=128, heads=2, card=CARD, device="cuda")
    codes = []
    for kernels in ("on", "off"):
        batch = batch_for(lm, slots=4, kernels=kernels)
        slots = []
        for seed, sampling in enumerate((GREEDY, DRAWN, SamplingParams(top_p=0.9))):
            given = conditions(kind, dim=128, seed=seed, tokens=4 + seed, chroma=9)
            given = {name: (tensor.cuda(), mask.cuda()) for name, (tensor, mask) in given.items()}
            slots.append(opened(batch, given, sampling, seed=seed, length=300))
            batch.step()
        codes.append([finished(batch, slot) for slot in slots])
    for ours, expected in zip(*codes, strict=True):
        assert (ours == expected).float().mean() > 0.99


@pytest.mark.cuda
@needs_gpu
def test_threads_replay_the_graphs_that_another_thread_recorded() -> None:
    """In fp32, because in fp16 products with another number of rows round differently."""
    engine = Engine(batch_for(language_model("text", delays=STEREO, card=CARD, device="cuda"), slots=3))

    def run(seed: int) -> Tensor:
        return engine.generate(
            given_for("text", seed, "cuda"), prompt=None, length=200 + seed, sampling=DRAWN,
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip

    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(run, range(3)))
    for seed, tokens in enumerate(together):
        assert torch.equal(tokens, run(seed))


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("graphs", ["on", "off"])
@pytest.mark.parametrize("kernels", ["on", "off"])
def test_a_step_never_waits_for_the_device(graphs: Switch, kernels: Switch) -> None:
    batch = batch_for(model("text", "cuda"), graphs=graphs, kernels=kernels)
    slot = opened(batch, given_for("text", device="cuda"), DRAWN)
    batch.step()  # records or compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            batch.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert slot.filled > 20


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("kind", ["text", "melody"])
def test_logits_are_audiocrafts_under_autocast(kind: str) -> None:
    lm, given = model(kind, "cuda"), given_for(kind, device="cuda")
    batch = batch_for(lm, batch_kind="ragged")
    slot = opened(batch, given, GREEDY)
    seen = [slot.logits]
    while not slot.done:
        batch.step()
        seen.append(slot.logits)
    with torch.inference_mode(), torch.autocast("cuda", torch.float16):
        full = lm(slot.columns[None, :, :-1].repeat(2, 1, 1), [], given)
    guided = full[1] + (full[0] - full[1]) * GREEDY.guidance
    ours = torch.stack(seen, dim=1)
    torch.testing.assert_close(ours.float(), guided.float(), atol=0.1, rtol=0.02)


def test_buffers_grow_for_a_request_that_they_cannot_hold() -> None:
    """A prompt of 2,000 characters can have more T5 tokens than the default buffers hold."""
    lm = model("text")
    given = conditions("text", tokens=700)
    sampling = SamplingParams(temperature=0)
    expected = Engine(batch_for(lm)).generate(
        given, prompt=None, length=20, sampling=sampling, generator=torch.Generator()
    )
    engine = Engine(batch_for(lm, batch_kind="static"))
    for _ in range(2):
        tokens = engine.generate(
            given, prompt=None, length=20, sampling=sampling, generator=torch.Generator()
        )
        assert torch.equal(tokens, expected)


def test_there_is_room_for_exactly_what_the_buffers_hold() -> None:
    batch = batch_for(model("text"), batch_kind="static")

    def fits(length: int, tokens: int = 5) -> bool:
        given = conditions("text", tokens=tokens)
        return batch.has_room(DecodeRequest(given, None, length, GREEDY, torch.Generator()))

    assert fits(1500) and not fits(1501), "1,504 columns, of which one is special and three are delays"
    assert fits(8, tokens=512) and not fits(8, tokens=513)


def test_recordings_are_dropped_before_the_memory_that_they_read_is_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A long prefill replaces the position embeddings, and may be cancelled after that."""
    batch = batch_for(model("melody"), batch_kind="static")
    assert isinstance(batch, StaticBatch)
    tables, dropped = [batch.decoder.position_embeddings], []
    monkeypatch.setattr(batch.graphed, "forget", lambda: dropped.append(batch.decoder.position_embeddings))

    def cancel() -> None:
        tables.append(batch.decoder.position_embeddings)
        raise InterruptedError

    given = conditions("melody", tokens=2100)
    with pytest.raises(InterruptedError):
        batch.open(DecodeRequest(given, None, 8, GREEDY, torch.Generator()), cancel)
    assert len(tables[1]) > len(tables[0]) and [table is tables[0] for table in dropped] == [True]
    assert not batch.slots


def test_buffers_that_could_not_grow_are_allocated_again_for_the_next_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch = batch_for(model("text"), slots=2, batch_kind="static")
    assert isinstance(batch, StaticBatch)

    def generated(engine: Engine, given: Conditions) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return engine.generate(given, prompt=None, length=30, sampling=DRAWN, generator=generator)

    def scarce(decoder: Decoder, capacity: Capacity) -> DeviceState:
        if capacity.text > 512:
            raise torch.OutOfMemoryError("for the buffers")
        return DeviceState(decoder, capacity)

    monkeypatch.setattr(static, "DeviceState", scarce)
    with pytest.raises(torch.OutOfMemoryError):
        generated(Engine(batch), conditions("text", tokens=600))
    assert batch.state.keys.numel() == 0, "the old buffers were dropped before"
    fresh = batch_for(model("text"), slots=2, batch_kind="static")
    tokens = generated(Engine(batch), given_for("text"))
    assert torch.equal(tokens, generated(Engine(fresh), given_for("text")))
    assert batch.state.capacity == Capacity(2)
