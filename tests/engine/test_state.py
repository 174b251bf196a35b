"""A step never leaves the device. The device here is a pretend GPU, see `fixtures/pretend_gpu.py`."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.random_models import MODELS, conditions, language_model
from musicgen_svc.audiocraft_compat import LMModel
from musicgen_svc.engine import static
from musicgen_svc.engine.batch import DecodeRequest
from musicgen_svc.engine.factory import batch_for
from musicgen_svc.engine.plain_step import PlainStep
from musicgen_svc.engine.sampling_params import SamplingParams
from musicgen_svc.engine.state import ActiveExtent, DeviceState
from musicgen_svc.engine.static import StaticBatch
from tests.fixtures.pretend_gpu import PretendGpu, pretend_gpu

CARD, DIM = 40, 32


class DeviceOnly(TorchDispatchMode):
    """Records the name of every operation, and refuses an operation with any tensor on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # for example the device of a tensor
            return func(*args, **kwargs)
        with self:  # also records the operations of which this one consists
            result = func.decompose(*args, **kwargs)
        if result is NotImplemented:
            result = func(*args, **kwargs)
            self.operations.append(str(func))
        devices = {x.device.type for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)}
        assert devices <= {"cuda"}, f"{func} on {devices}"
        return result


@cache
def model_on_cpu(name: str) -> LMModel:
    """A tiny model with the dtypes that a GPU has: layers in fp16, the rest in fp32."""
    kind, delays = MODELS[name]
    return language_model(kind, delays=delays, dim=DIM, layers=2, heads=2, card=CARD, dtype=torch.float16)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendGpu]:
    monkeypatch.setattr(static, "CACHE_BUCKET", 2)  # so that a short piece has several extents
    for name in MODELS:
        model_on_cpu(name)
    with pretend_gpu(monkeypatch) as found:
        yield found


def batch_on_gpu(name: str) -> StaticBatch:
    batch = batch_for(model_on_cpu(name).to("cuda"), slots=4, graphs="off", kernels="off")
    assert isinstance(batch, StaticBatch)
    return batch


def request(name: str, frames: int, *, length: int, tokens: int = 5, **sampling: Any) -> DecodeRequest:
    """A request whose prompt of `frames` frames is on the host. Without `tokens` it has no condition."""
    kind, delays = MODELS[name]
    given = conditions(kind, dim=DIM, tokens=tokens, chroma=9) if tokens else {}
    given = {name: (embedding.to("cuda"), mask.to("cuda")) for name, (embedding, mask) in given.items()}
    prompt = torch.zeros(len(delays), frames, dtype=torch.long) if frames else None
    return DecodeRequest(given, prompt, length, SamplingParams(**sampling), torch.Generator())


def operations_of(call: Callable[[], object], gpu: PretendGpu) -> list[str]:
    """The names of the operations of a call, which must all be on the device and must not wait for it."""
    gpu.waits_are_errors = True
    try:
        with DeviceOnly() as seen:
            call()
    finally:
        gpu.waits_are_errors = False
    return seen.operations


@pytest.mark.parametrize("name", MODELS)
def test_a_step_never_leaves_the_device_and_is_the_same_at_every_position(
    name: str, gpu: PretendGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step has the same operations in the same order for requests of any lengths."""
    batch = batch_on_gpu(name)
    extents: list[ActiveExtent] = []
    logits = PlainStep.logits

    def seen(step: PlainStep, state: DeviceState, extent: ActiveExtent) -> Tensor:
        extents.append(extent)
        return logits(step, state, extent)

    monkeypatch.setattr(PlainStep, "logits", seen)
    slots, steps = [], []
    for wanted in (
        request(name, 0, length=9),
        request(name, 3, length=11, tokens=70, temperature=0),
        request(name, 2, length=6, top_p=0.9),
        request(name, 0, length=5, tokens=0),
    ):
        slots.append(batch.open(wanted))
        steps.append(operations_of(batch.step, gpu))
    while any(slot.running for slot in slots):
        steps.append(operations_of(batch.step, gpu))
    assert operations_of(batch.step, gpu) == [], "all slots are done"
    different = {(extent.slots, tuple(operations)) for extent, operations in zip(extents, steps, strict=True)}
    assert len(different) == 3 == len({extent.slots for extent in extents}), "for 1, 2 and 4 slots"
    assert all(len(operations) > 200 for operations in steps)
    assert len({extent.positions for extent in extents if extent.slots == 4}) > 2


@pytest.mark.parametrize("name", MODELS)
def test_opening_closing_and_dry_runs_never_leave_the_device_either(
    name: str, gpu: PretendGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the prefill may: it looks which rows are needed, and copies the prompt from the host."""
    batch, opened = batch_on_gpu(name), []
    for owner, method in ((DeviceState, "open_slot"), (PlainStep, "draw")):
        call = getattr(owner, method)
        monkeypatch.setattr(
            owner,
            method,
            lambda *given, call=call: opened.append(operations_of(lambda: call(*given), gpu)),
        )
    first, _ = (batch.open(request(name, 2, length=6)) for _ in range(2))
    assert len(opened) == 4 and len(opened[0] + opened[1]) > 50
    monkeypatch.undo()
    with torch.inference_mode():
        batch.slots[0].filled = 1  # the step is made in the dry run only
        assert operations_of(lambda: batch.state.with_all_slots_stopped(batch.step), gpu)
    assert operations_of(lambda: batch.close(first), gpu)
    assert operations_of(batch.clear, gpu)


@pytest.mark.parametrize(
    ("mistake", "error"),
    [
        (lambda at: at + int(at.max()), RuntimeError),
        (lambda at: at if at.any() else -at, RuntimeError),
        (lambda at: at[at >= 0], RuntimeError),
        (lambda at: at.unique(), RuntimeError),
        (lambda at: at.cpu(), RuntimeError),
        (lambda at: at.cpu().to(at.device), RuntimeError),
        (lambda at: at + torch.tensor([1, 0, 0, 0], device="cuda"), (RuntimeError, AssertionError)),
        (lambda at: at * torch.tensor(1), AssertionError),
    ],
    ids=[
        "number", "truth", "mask", "unique", "copy", "copy and back", "copy from the host",
        "scalar of the host",
    ],
)  # fmt: skip
def test_a_step_that_uses_the_host_is_found(
    mistake: Callable[[Tensor], Tensor], error: Any, gpu: PretendGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = batch_on_gpu("text")
    batch.open(request("text", 0, length=12))
    position = DeviceState.position
    monkeypatch.setattr(DeviceState, "position", lambda state: mistake(position(state)))
    with pytest.raises(error, match=r"synchronizing|on \{"):
        operations_of(batch.step, gpu)


def test_cudnns_attention_is_off(gpu: PretendGpu) -> None:
    """On some GPUs it makes a plan for each length of a prefill, which a pretend GPU cannot show."""
    batch_on_gpu("text")
    assert not torch.backends.cuda.cudnn_sdp_enabled()
