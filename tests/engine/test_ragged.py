"""On a CPU in fp32 a ragged batch generates exactly audiocraft's tokens."""

from functools import cache

import pytest
import torch
from torch import Tensor

from benchmarks.random_models import (
    MONO,
    STEREO,
    Conditions,
    audiocraft_generates,
    conditions,
    language_model,
)
from musicgen_svc.audiocraft_compat import LMModel
from musicgen_svc.engine.engine import Engine
from musicgen_svc.engine.factory import batch_for
from musicgen_svc.engine.ragged import RaggedSlot
from musicgen_svc.engine.sampling_params import SamplingParams

CARD = 300
LAYOUTS = {"mono": MONO, "stereo": STEREO}


@cache
def model(kind: str, layout: str = "mono") -> LMModel:
    return language_model(kind, delays=LAYOUTS[layout], card=CARD)


def prompt_of(lm: LMModel, frames: int, seed: int = 0) -> Tensor | None:
    if frames == 0:
        return None
    return torch.randint(lm.card, (lm.n_q, frames), generator=torch.Generator().manual_seed(seed))


def given_for(kind: str, seed: int = 0) -> Conditions:
    return conditions(kind, seed=seed, chroma=13, tokens=5 + seed)


def assert_equal_to_audiocraft(
    lm: LMModel, given: Conditions, *, frames: int, length: int, sampling: SamplingParams, seed: int = 3
) -> Tensor:
    prompt = prompt_of(lm, frames)
    expected = audiocraft_generates(lm, given, prompt=prompt, length=length, sampling=sampling, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    tokens = Engine(batch_for(lm)).generate(
        given, prompt=prompt, length=length, sampling=sampling, generator=generator
    )
    assert torch.equal(tokens, expected)
    assert tokens.unique().numel() > 20, "a model that repeats itself proves nothing"
    return tokens


# A pairwise cover of model, layout, prompt, guidance, top_k / top_p and temperature (0: greedy).
COVER = [
    ("text", "mono", 0, 3.0, {"top_k": 250}, 1.0),
    ("text", "mono", 20, 0.0, {"top_k": 50}, 0.7),
    ("text", "mono", 0, 1.0, {"top_p": 0.9}, 1.3),
    ("text", "mono", 20, 7.0, {"top_k": 0}, 1.0),
    ("text", "stereo", 20, 3.0, {"top_k": 0}, 1.3),
    ("text", "stereo", 0, 0.0, {"top_k": 1000}, 1.0),
    ("text", "stereo", 20, 1.0, {"top_k": 250}, 0.7),
    ("text", "stereo", 0, 7.0, {"top_k": 50}, 1.3),
    ("text", "mono", 20, 3.0, {"top_k": 250}, 0.0),
    ("text", "stereo", 0, 1.0, {"top_k": 0}, 0.0),
    ("text", "mono", 0, 7.0, {"top_k": 1}, 0.7),
    ("melody", "mono", 20, 3.0, {"top_k": 1000}, 0.7),
    ("melody", "mono", 0, 0.0, {"top_k": 0}, 1.3),
    ("melody", "mono", 0, 1.0, {"top_k": 50}, 1.0),
    ("melody", "mono", 20, 7.0, {"top_p": 0.9}, 1.0),
    ("melody", "stereo", 0, 3.0, {"top_p": 0.9}, 0.7),
    ("melody", "stereo", 20, 0.0, {"top_k": 250}, 1.3),
    ("melody", "stereo", 20, 1.0, {"top_k": 1}, 1.0),
    ("melody", "stereo", 0, 7.0, {"top_k": 1000}, 1.3),
    ("melody", "mono", 0, 7.0, {"top_k": 250}, 0.0),
]


@pytest.mark.parametrize(("kind", "layout", "frames", "guidance", "kept", "temperature"), COVER)
def test_tokens_are_audiocrafts(
    kind: str, layout: str, frames: int, guidance: float, kept: dict[str, float], temperature: float
) -> None:
    sampling = SamplingParams(guidance=guidance, temperature=temperature, **kept)  # type: ignore[arg-type]
    assert_equal_to_audiocraft(
        model(kind, layout), given_for(kind), frames=frames, length=70, sampling=sampling
    )


@pytest.mark.parametrize("length", [1, 2, 4])
def test_tokens_are_audiocrafts_for_lengths_below_the_delays(length: int) -> None:
    lm = model("text", "stereo")
    generator = torch.Generator().manual_seed(0)
    given, sampling = given_for("text"), SamplingParams()
    tokens = Engine(batch_for(lm)).generate(
        given, prompt=None, length=length, sampling=sampling, generator=generator
    )
    expected = audiocraft_generates(lm, given, prompt=None, length=length, sampling=sampling, seed=0)
    assert torch.equal(tokens, expected)


def test_tokens_are_audiocrafts_if_the_prompt_leaves_one_frame() -> None:
    tokens = assert_equal_to_audiocraft(
        model("melody"), given_for("melody"), frames=59, length=60, sampling=SamplingParams()
    )
    prompt = prompt_of(model("melody"), 59)
    assert prompt is not None and torch.equal(tokens[:, :59], prompt)


@pytest.mark.parametrize("kind", ["text", "melody"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_two_equal_rows_are_computed_once_with_the_same_tokens(
    kind: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {name: (tensor[1:].repeat(2, 1, 1), mask) for name, (tensor, mask) in given_for(kind).items()}
    rows: set[int] = set()
    draw_column = RaggedSlot.draw_column
    monkeypatch.setattr(
        RaggedSlot, "draw_column", lambda slot, logits: (rows.add(len(logits)), draw_column(slot, logits))[1]
    )
    sampling = SamplingParams(temperature=temperature)
    assert_equal_to_audiocraft(model(kind), given, frames=0, length=70, sampling=sampling)
    assert rows == {1}


def test_tokens_are_audiocrafts_without_any_condition() -> None:
    assert_equal_to_audiocraft(model("melody"), {}, frames=0, length=70, sampling=SamplingParams())


@pytest.mark.parametrize(
    ("kind", "layout", "frames"), [("text", "mono", 0), ("melody", "mono", 9), ("text", "stereo", 9)]
)
def test_cached_logits_are_those_of_the_full_forward_at_every_step(
    kind: str, layout: str, frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, given = model(kind, layout), given_for(kind)
    seen: list[Tensor] = []
    slots: list[RaggedSlot] = []
    draw_column = RaggedSlot.draw_column

    def record(slot: RaggedSlot, logits: Tensor) -> None:
        seen.append(logits)
        slots.append(slot)
        draw_column(slot, logits)

    monkeypatch.setattr(RaggedSlot, "draw_column", record)
    Engine(batch_for(lm)).generate(
        given,
        prompt=prompt_of(lm, frames),
        length=40,
        sampling=SamplingParams(),
        generator=torch.Generator().manual_seed(0),
    )
    columns = slots[0].columns
    full = lm(
        columns[None, :, :-1].repeat(2, 1, 1), conditions=[], condition_tensors=given
    )  # [2, K, S, card]
    cached = torch.stack(seen, dim=2)
    assert cached.shape[2] == columns.shape[1] - 1 - frames
    torch.testing.assert_close(cached, full[:, :, frames:], atol=2e-5, rtol=1e-4)
