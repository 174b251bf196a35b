"""The static batch on a GPU that is not there, without a number in it.

Under torch's FakeTensorMode a tensor has a shape, a type and a device, and no values. Operations that mix
devices raise, and so does whatever looks at a value. What this cannot show (kernels, graphs, numbers, and
what a GPU's own attention consists of) is marked `cuda` in the other files.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.random_models import MODELS, Conditions, language_model
from musicgen_svc.engine import decoder, prefill, static
from musicgen_svc.engine.batch import DecodeRequest
from musicgen_svc.engine.factory import batch_for
from musicgen_svc.engine.sampling_params import SamplingParams
from musicgen_svc.engine.state import ActiveExtent, DeviceState
from musicgen_svc.engine.static import StaticBatch

CARD, DIM = 40, 32


class OnTheDevice(TorchDispatchMode):
    """Writes down every operation, and refuses a tensor of the host's in any: it was copied, or will be."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # which device a tensor is on, say
            return func(*args, **kwargs)
        with self:  # an operation that is made of others is looked into
            result = func.decompose(*args, **kwargs)
        if result is NotImplemented:
            result = func(*args, **kwargs)
            self.operations.append(str(func))
        devices = {x.device.type for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)}
        assert devices <= {"cuda"}, f"{func} on {devices}"
        return result


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every tensor is a fake one. What is read before the first step, on purpose, is answered from here."""
    monkeypatch.setattr(prefill, "rows_that_matter", lambda given, guidance: [0, 1] if given else [0])
    monkeypatch.setattr(prefill, "rows_with_text", lambda text, rows: [] if text is None else [0])
    monkeypatch.setattr(static, "seed_from", lambda generator: 2**40 + 1)
    monkeypatch.setattr(  # the real one compares addresses
        decoder, "_merged_heads", lambda lm: torch.cat([linear.weight for linear in lm.linears])
    )
    monkeypatch.setattr(fake_tensor, "CONSTANT_NUMEL_LIMIT", -1)  # else some are computed with, on a real GPU
    monkeypatch.setattr(static, "CACHE_BUCKET", 2)  # so that a short piece reads several
    with FakeTensorMode():
        yield


def on_gpu(name: str) -> StaticBatch:
    """Four places for a model as a GPU has it: layers in fp16, the rest in fp32."""
    kind, delays = MODELS[name]
    with unset_fake_temporarily():
        lm = language_model(kind, delays=delays, dim=DIM, layers=2, heads=2, card=CARD, dtype=torch.float16)
        types = {name: (x.shape, x.dtype) for name, x in lm.state_dict().items()}
    lm.load_state_dict(
        {name: torch.empty(shape, dtype=dtype, device="cuda") for name, (shape, dtype) in types.items()},
        assign=True,
    )
    batch = batch_for(lm, slots=4, graphs="off", kernels="off")
    assert isinstance(batch, StaticBatch), "what a GPU is given"
    return batch


def request(name: str, frames: int, *, length: int, tokens: int = 5, **sampling: Any) -> DecodeRequest:
    """`tokens` 0: neither a text nor a melody, and so a single row. The prompt comes from the host."""
    kind, delays = MODELS[name]

    def embedded(size: int) -> tuple[Tensor, Tensor]:
        mask = torch.ones(2, size, dtype=torch.bool, device="cuda")
        return torch.empty(2, size, DIM, device="cuda"), mask

    given: Conditions = {"description": embedded(tokens)} if tokens else {}
    if tokens and kind == "melody":
        given = {"self_wav": embedded(9), **given}
    prompt = torch.zeros(len(delays), frames, dtype=torch.long) if frames else None
    return DecodeRequest(given, prompt, length, SamplingParams(**sampling), torch.Generator())


def watched(call: Callable[[], object]) -> list[str]:
    with OnTheDevice() as seen:
        call()
    return seen.operations


@pytest.mark.parametrize("name", MODELS)
def test_a_step_never_leaves_the_device_and_is_the_same_at_every_position(
    name: str, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same operations in the same order, wherever its requests of several lengths are."""
    batch = on_gpu(name)
    reaches: list[ActiveExtent] = []
    step = DeviceState.step
    monkeypatch.setattr(DeviceState, "step", lambda state, reach: (reaches.append(reach), step(state, reach)))
    slots, steps = [], []
    for wanted in (
        request(name, 0, length=9),
        request(name, 3, length=11, tokens=70, temperature=0),
        request(name, 2, length=6, top_p=0.9),
        request(name, 0, length=5, tokens=0),
    ):
        slots.append(batch.open(wanted))
        steps.append(watched(batch.step))
    while any(slot.running for slot in slots):
        steps.append(watched(batch.step))
    assert watched(batch.step) == [], "all are done"
    alike = {(reach.slots, tuple(operations)) for reach, operations in zip(reaches, steps, strict=True)}
    assert len(alike) == 3 == len({reach.slots for reach in reaches}), "for 1, 2 and 4 of them: views differ"
    assert all(len(operations) > 200 for operations in steps)
    assert len({reach.positions for reach in reaches if reach.slots == 4}) > 2


@pytest.mark.parametrize("name", MODELS)
def test_nor_do_joining_leaving_and_rehearsing_wait_for_it(
    name: str, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prefill does: it looks which rows matter, and takes the prompt from wherever it is."""
    batch, joined = on_gpu(name), []
    move_in = DeviceState.move_in
    monkeypatch.setattr(
        DeviceState, "move_in", lambda state, *given: joined.append(watched(lambda: move_in(state, *given)))
    )
    first, _ = (batch.open(request(name, 2, length=6)) for _ in range(2))
    assert len(joined) == 2 and len(joined[0]) > 50
    state, reach = batch.state, ActiveExtent(2, 16, 64)
    with torch.inference_mode():
        assert watched(lambda: state.with_all_slots_stopped(lambda: state.step(reach)))
    assert watched(lambda: batch.close(first))
    assert watched(batch.clear)


@pytest.mark.parametrize(
    ("mistake", "error"),
    [
        (lambda at: at + int(at.max()), DataDependentOutputException),
        (lambda at: at if at.any() else -at, DataDependentOutputException),
        (lambda at: at[at >= 0], DynamicOutputShapeException),
        (lambda at: at.cpu(), AssertionError),
        (lambda at: at.cpu().to(at.device), AssertionError),
        (lambda at: at + torch.tensor([1, 0, 0, 0], device="cuda"), AssertionError),
        (lambda at: at * torch.tensor(1), AssertionError),
    ],
    ids=["number", "truth", "mask", "copy", "and back", "from the host", "scalar of the host"],
)
def test_a_step_that_asks_the_host_is_found(
    mistake: Callable[[Tensor], Tensor], error: type[Exception], gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = on_gpu("text")
    batch.open(request("text", 0, length=12))
    position = DeviceState.position
    monkeypatch.setattr(DeviceState, "position", lambda state: mistake(position(state)))
    with pytest.raises(error):
        watched(batch.step)


def test_cudnns_attention_is_off() -> None:
    """On a GPU of its choice it would plan anew for every length, and there is none here to show it."""
    assert not torch.backends.cuda.cudnn_sdp_enabled()
