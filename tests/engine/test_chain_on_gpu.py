"""The kernels on a GPU: their bits, their agreement with audiocraft, and many steps.

What does not need the kernels runs on a CPU too, with plain steps and less of it.
"""

import random
from typing import Any

import pytest
import torch
from chain_steps import LENGTHS, TEXT, decoder_of, state_with
from test_static import CARD, GREEDY, given_for, model, opened
from torch import Tensor

from benchmarks.random_models import MODELS
from musicgen_svc.engine.chain import launches
from musicgen_svc.engine.chain.chain import Chain
from musicgen_svc.engine.factory import batch_for
from musicgen_svc.engine.sampling import mix
from musicgen_svc.engine.sampling_params import SamplingParams
from musicgen_svc.engine.state import ActiveExtent, DeviceState, Step
from musicgen_svc.engine.static import StaticBatch

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, needs_gpu])]


# --- bits ---------------------------------------------------------------------------------------


def step_of(step: Step, state: DeviceState, slots: int) -> list[Tensor]:
    """Computes a step: the logits, and what it changes of the state."""
    logits = step.logits(state, ActiveExtent(slots, max(LENGTHS), TEXT)).clone()
    step.draw(state, logits, slice(slots))
    return [logits, state.keys.clone(), state.values.clone(), state.columns.clone(), state.filled.clone()]


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("slots", [1, 4, 16])
def test_steps_have_the_same_bits_if_launches_overlap(
    name: str, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the shapes of a small model, and often, because an early read would be seen by chance only."""
    device = torch.device("cuda", torch.cuda.current_device())
    if not launches.overlaps(device):
        pytest.skip("launches do not overlap on this GPU")
    decoder = decoder_of(name, device, dim=1024, heads=16, layers=8, card=2048)

    def one_step() -> list[Tensor]:
        return step_of(Chain(decoder, slots), state_with(decoder, list(range(slots))), slots)

    with torch.inference_mode():
        found = [one_step() for _ in range(50)]
        monkeypatch.setattr(launches, "overlaps", lambda device: False)
        expected = one_step()
    assert all(torch.equal(*pair) for each in found for pair in zip(each, expected, strict=True))


# --- audiocraft ---------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["text", "melody"])
def test_teacher_forced_logits_are_audiocrafts(
    kind: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the most likely token is, wherever it is more likely than the next by more than what may differ."""
    tolerance = 0.1 if device == "cuda" else 1e-3
    lm, given = model(kind, device), given_for(kind, device=device)
    kernels = "on" if device == "cuda" else "off"
    batch = batch_for(lm, batch_kind="static", graphs="off", kernels=kernels)
    assert isinstance(batch, StaticBatch) and batch.path == ("kernels" if device == "cuda" else "plain")
    seen: list[Tensor] = []
    compute = batch._step.logits

    def noted(*step: Any) -> Tensor:
        seen.append(compute(*step))
        return seen[-1].clone()

    monkeypatch.setattr(batch._step, "logits", noted)
    slot = opened(batch, given, GREEDY, length=100)
    while not slot.done:
        batch.step()
        seen[-1] = mix(seen[-1][0, 0], seen[-1][0, 1], GREEDY.guidance).float()
    ours = torch.stack(seen, dim=1)  # [K, T, card], from the second column on
    with torch.inference_mode(), torch.autocast("cuda", torch.float16, enabled=device == "cuda"):
        full = lm(slot.columns[None, :, :-1].repeat(2, 1, 1), [], given).float()
    theirs = (full[1] + (full[0] - full[1]) * GREEDY.guidance)[:, 1:]
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance / 5)
    top = theirs.topk(2, dim=-1).values
    clear = top[..., 0] - top[..., 1] > 2 * (tolerance + tolerance / 5 * top[..., 0].abs())
    assert clear.float().mean() > 0.3
    assert torch.equal(ours.argmax(dim=-1)[clear], theirs.argmax(dim=-1)[clear])


# --- many steps ---------------------------------------------------------------------------------


def allocated() -> int:
    """The bytes of tensors on the GPU."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def joins_and_leaves(batch: StaticBatch, steps: int, longest: int, device: str) -> list[int]:
    """Makes steps, between which requests join and leave: the bytes of tensors after each change.

    All tokens of a request that has ended must be tokens of the codebook.
    """
    chance = random.Random(0)
    sizes = []
    kind = "text" if batch.decoder.has_text else "melody"
    for step in range(steps):
        if step % 10 == 0 or not any(slot.running for slot in batch.slots):
            for slot in list(batch.slots):
                if slot.done:
                    assert ((slot.codes >= 0) & (slot.codes < CARD)).all()
                if slot.done or chance.random() < 0.1:
                    batch.close(slot)
            if len(batch.slots) < batch.num_slots:
                sampling = SamplingParams(temperature=chance.choice([0, 1]), top_p=chance.choice([0, 0.9]))
                given = given_for(kind, chance.randrange(60), device)
                opened(batch, given, sampling, seed=step, length=chance.randrange(2, longest))
            sizes.append(allocated())
        batch.step()
    if device == "cuda":
        torch.cuda.synchronize()  # raises an error if a kernel failed
    return sizes


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["text", "melody"])
def test_ten_thousand_steps_have_no_fault_and_take_no_more_memory(kind: str, device: str) -> None:
    """On a CPU, sixty steps."""
    on_gpu = device == "cuda"
    batch = batch_for(
        model(kind, device), slots=4, batch_kind="static", graphs="on" if on_gpu else "off",
        kernels="on" if on_gpu else "off",
    )  # fmt: skip
    assert isinstance(batch, StaticBatch)
    sizes = joins_and_leaves(batch, 10_000 if on_gpu else 60, 1400 if on_gpu else 12, device)
    later = sizes[len(sizes) // 4 :]  # by then, a graph is recorded for each number of slots
    assert max(later) - min(later) < 2**20
