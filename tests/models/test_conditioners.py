"""The conditions of a model: only the relevant part of a clip is separated, and long prompts are refused."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from musicgen_svc.errors import InputError
from musicgen_svc.loading.loader import Loader
from musicgen_svc.models.conditioners import MAX_TOKENS, MELODY, Conditioner, MelodyConditioner
from musicgen_svc.models.demucs import REACH_S
from musicgen_svc.runtime.randomness import GlobalRandom
from musicgen_svc.runtime.ticks import Tick
from musicgen_svc.settings import Settings
from musicgen_svc.weights.catalog import read_catalog
from musicgen_svc.weights.paths import Weights

CPU = torch.device("cpu")
RATE_HZ, WINDOW_S = 32_000, 30


@pytest.fixture(scope="module")
def conditioner(weights: Path) -> Conditioner:
    model = Loader(Weights.at(weights, read_catalog(), None), CPU, Settings()).model("melody")
    assert model.window_s == WINDOW_S
    return model.conditioner


def noise(seconds: float) -> Tensor:
    return torch.randn(1, int(seconds * RATE_HZ), generator=torch.Generator().manual_seed(0)) / 5


def test_only_the_part_of_a_melody_that_matters_is_separated(
    conditioner: Conditioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Demucs would need minutes and gigabytes for a quarter of an hour, for a condition of 30 s."""
    seen: list[int] = []
    melody = conditioner.conditioners[MELODY]
    assert isinstance(melody, MelodyConditioner)
    separate = melody._separate

    def counted(audio: Tensor, tick: Tick) -> Tensor:
        seen.append(audio.shape[-1])
        return separate(audio, tick)

    monkeypatch.setattr(melody, "_separate", counted)
    clip = noise(50)
    embeddings = []
    for part in (clip, clip[:, : int(WINDOW_S + REACH_S) * RATE_HZ], clip[:, : 20 * RATE_HZ]):
        with GlobalRandom(0, CPU).pinned():
            embeddings.append(conditioner.melody(part)[MELODY][0])
    assert seen == [40 * RATE_HZ, 40 * RATE_HZ, 20 * RATE_HZ]
    monkeypatch.setattr(melody, "_max_samples", clip.shape[1])
    with GlobalRandom(0, CPU).pinned():
        whole = conditioner.melody(clip)[MELODY][0]
    assert torch.equal(embeddings[0], whole) and torch.equal(embeddings[1], whole)
    assert not torch.equal(embeddings[2], whole)


def test_a_prompt_of_too_many_tokens_is_refused(conditioner: Conditioner) -> None:
    """T5's tokenizer expands some characters to words, so the number of characters is no bound."""
    with pytest.raises(InputError, match=rf"^prompt has \d+ tokens; at most {MAX_TOKENS} are accepted\.$"):
        conditioner.text("a b " * MAX_TOKENS)
    conditioner.text("a b " * 300)


def test_t5_ticks_after_each_block(conditioner: Conditioner) -> None:
    ticks: list[tuple[int, int]] = []
    conditioner.text("rock", lambda *tick: ticks.append(tick))
    assert ticks and ticks == [(i + 1, len(ticks)) for i in range(len(ticks))]
