"""The factory chooses how steps are computed, and says in the log which way it is and why."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from benchmarks.random_models import conditions, language_model
from musicgen_svc.audiocraft_compat import LMModel
from musicgen_svc.engine import factory
from musicgen_svc.engine.batch import Batch, DecodeRequest
from musicgen_svc.engine.decoder import Decoder
from musicgen_svc.engine.engine import Engine
from musicgen_svc.engine.factory import Switch, batch_for, step_for
from musicgen_svc.engine.plain_step import PlainStep
from musicgen_svc.engine.ragged import RaggedBatch
from musicgen_svc.engine.sampling_params import SamplingParams
from musicgen_svc.engine.selftest import disagreements
from musicgen_svc.engine.state import ActiveExtent, DeviceState, Step
from musicgen_svc.engine.static import StaticBatch
from musicgen_svc.errors import GenerationError
from musicgen_svc.runtime.fair_queue import FairQueue
from musicgen_svc.runtime.ticks import Check
from tests.fixtures.pretend_gpu import PretendGpu, pretend_gpu


class PretendKernels(PlainStep):
    """Plain steps in the place of the kernels."""

    name = "kernels"
    reads_lengths = True

    def __init__(self, decoder: Decoder, slots: int) -> None:
        super().__init__(decoder)


class WrongLogits(PretendKernels):
    def logits(self, state: DeviceState, extent: ActiveExtent) -> Tensor:
        return super().logits(state, extent) * 1.03


class Nan(PretendKernels):
    def logits(self, state: DeviceState, extent: ActiveExtent) -> Tensor:
        return super().logits(state, extent) * torch.nan


class WrongDraw(PretendKernels):
    def draw(self, state: DeviceState, logits: Tensor, slots: slice) -> None:
        super().draw(state, logits.flip(1), slots)


def no_compiler(decoder: Decoder, slots: int) -> Step:
    raise RuntimeError("Failed to find C compiler.\nSet CC.")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> object:
    with pretend_gpu(monkeypatch) as found:
        yield found


def kernels_are(monkeypatch: pytest.MonkeyPatch, kernels: Callable[[Decoder, int], Step]) -> None:
    monkeypatch.setattr(factory, "_kernels", kernels)


def small_model(device: str = "cpu", kind: str = "text") -> LMModel:
    dtype = torch.float16 if device == "cuda" else torch.float32
    return language_model(kind, dim=32, layers=1, heads=2, card=40, dtype=dtype).to(device)


def test_a_cpu_has_no_kernels_unless_they_are_switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels_are(monkeypatch, PretendKernels)
    paths = {
        switch: batch_for(small_model(), batch_kind="static", kernels=switch)
        for switch in ("auto", "on", "off")
    }
    assert {switch: getattr(batch, "path", None) for switch, batch in paths.items()} == {
        "auto": "plain", "on": "kernels", "off": "plain",
    }  # fmt: skip
    assert isinstance(batch_for(small_model(), batch_kind="ragged", kernels="on"), RaggedBatch)


@pytest.mark.parametrize("kind", ["text", "melody"])
def test_kernels_that_agree_are_used_on_a_gpu_by_default(
    kind: str, gpu: PretendGpu, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernels_are(monkeypatch, PretendKernels)
    with caplog.at_level(logging.INFO):
        batch = batch_for(small_model("cuda", kind))
    assert isinstance(batch, StaticBatch) and batch.path == "kernels"
    assert caplog.messages == ["Decoding on the GPU with kernels; with CUDA graphs."]
    assert caplog.records[0].levelno == logging.INFO


@pytest.mark.parametrize(
    ("kernels", "reason"),
    [
        (no_compiler, "RuntimeError: Failed to find C compiler"),
        (WrongLogits, "the logits of the kernels differ by 0.03"),
        (Nan, "the logits of the kernels differ by nan"),
        (WrongDraw, "the kernels draw other tokens"),
    ],
)
def test_kernels_that_do_not_work_are_not_used_and_the_log_says_why(
    kernels: Callable[[Decoder, int], Step],
    reason: str,
    gpu: PretendGpu,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    kernels_are(monkeypatch, kernels)
    batch = batch_for(small_model("cuda"), graphs="off")
    assert isinstance(batch, StaticBatch) and batch.path == "plain"
    assert caplog.messages == [
        f"Decoding on the GPU without kernels, because {reason}; without CUDA graphs, because they are off."
    ]
    assert caplog.records[0].levelno == logging.WARNING


def test_kernels_that_are_switched_on_and_cannot_be_used_end_the_loading(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernels_are(monkeypatch, no_compiler)
    with pytest.raises(GenerationError, match=r"cannot be used: RuntimeError: Failed to find C compiler\.$"):
        batch_for(small_model(), batch_kind="static", kernels="on")


def test_steps_agree_with_themselves() -> None:
    decoder = Decoder(small_model())
    step, reason = step_for(decoder, 1)
    assert reason == "there is no GPU" and not disagreements(step, PlainStep(decoder), decoder)


def test_with_kernels_all_positions_and_texts_share_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels_are(monkeypatch, PretendKernels)
    lm = language_model(dim=32, layers=1, heads=2, card=40)
    extents: dict[Switch, set[ActiveExtent]] = {"on": set(), "off": set()}
    codes = []
    logits = PlainStep.logits
    for kernels, seen in extents.items():

        def noted(
            step: PlainStep, state: DeviceState, extent: ActiveExtent, seen: set[ActiveExtent] = seen
        ) -> Tensor:
            seen.add(extent)
            return logits(step, state, extent)

        monkeypatch.setattr(PlainStep, "logits", noted)
        batch: Batch = batch_for(lm, slots=2, batch_kind="static", kernels=kernels)
        seen.clear()  # of the self-test
        for tokens in (5, 70):
            codes.append(
                Engine(batch).generate(
                    conditions(dim=32, tokens=tokens), prompt=None, length=260, sampling=SamplingParams(),
                    generator=torch.Generator().manual_seed(0),
                )
            )  # fmt: skip
    assert extents["on"] == {ActiveExtent(1, 2048, 512)}
    assert extents["off"] == {
        ActiveExtent(1, positions, text) for positions in (256, 512) for text in (64, 128)
    }
    assert torch.equal(codes[0], codes[2]) and torch.equal(codes[1], codes[3])


def test_steps_of_more_slots_are_compiled_once_and_without_holding_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So the requests that are decoded meanwhile go on."""
    compiled: list[int] = []
    device_queue = FairQueue(1)
    compiling, release = threading.Event(), threading.Event()

    class Compiling(PretendKernels):
        def compile(self, state: DeviceState, slots: int, check: Check) -> None:
            compiled.append(slots)
            if slots == 2:
                compiling.set()
                assert release.wait(60)

    kernels_are(monkeypatch, Compiling)
    engine = Engine(batch_for(small_model(), slots=3, batch_kind="static", kernels="on"), device_queue)

    def generated(seed: int, on_frames: Callable[[Tensor], None] | None = None) -> Tensor:
        return engine.generate(
            {}, prompt=None, length=30, sampling=SamplingParams(),
            generator=torch.Generator().manual_seed(seed), on_frames=on_frames,
        )  # fmt: skip

    with ThreadPoolExecutor(2) as pool:
        second: list[Future[Tensor]] = []

        def go_on_when_the_second_compiles(frames: Tensor) -> None:
            if not second:
                second.append(pool.submit(generated, 1))
            assert compiling.wait(60)

        pool.submit(generated, 0, go_on_when_the_second_compiles).result(60)  # while the second compiles
        release.set()
        second[0].result(60)
    generated(2)
    assert compiled == [1, 2]


def test_steps_that_cannot_be_compiled_are_computed_without_kernels(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """For this number of slots; the others keep their kernels. It is tried once."""
    computed: list[tuple[str, int]] = []

    class Failing(PretendKernels):
        def compile(self, state: DeviceState, slots: int, check: Check) -> None:
            if slots == 2:
                raise RuntimeError("out of resource: shared memory\nRequired: 1000000")

    logits = PlainStep.logits

    def noted(step: PlainStep, state: DeviceState, extent: ActiveExtent) -> Tensor:
        computed.append((step.name, extent.slots))
        return logits(step, state, extent)

    monkeypatch.setattr(PlainStep, "logits", noted)
    kernels_are(monkeypatch, Failing)
    batch = batch_for(small_model(), slots=4, batch_kind="static", kernels="on")
    batch.prepare(4)
    batch.prepare(3)
    request = DecodeRequest({}, None, 9, SamplingParams(), torch.Generator().manual_seed(0))
    computed.clear()
    for _ in range(3):
        batch.open(request)
        batch.step()
    assert computed == [("kernels", 1), ("plain", 2), ("kernels", 4)]
    assert caplog.messages == [
        "Decoding 2 slots at once without kernels, because out of resource: shared memory"
    ]


def test_a_request_can_be_cancelled_while_kernels_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one compiles them."""
    compiled: list[int] = []

    class Slow(PretendKernels):
        def compile(self, state: DeviceState, slots: int, check: Check) -> None:
            check()
            compiled.append(slots)

    def cancel() -> None:
        raise InterruptedError

    kernels_are(monkeypatch, Slow)
    batch = batch_for(small_model(), slots=2, batch_kind="static", kernels="on")
    with pytest.raises(InterruptedError):
        batch.prepare(1, cancel)
    batch.prepare(2)
    assert compiled == [1, 2]
