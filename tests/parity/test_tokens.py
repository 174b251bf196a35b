"""The service's tokens equal those of audiocraft's own MusicGen for the same 32 kHz samples."""

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from demucs.apply import BagOfModels
from demucs.demucs import Demucs

from musicgen_svc.engine.sampling_params import SamplingParams
from musicgen_svc.generation import GenerationPlan, generate, prepare
from musicgen_svc.loading.loader import Loader
from musicgen_svc.models.conditioners import MELODY
from musicgen_svc.models.demucs import Separator
from musicgen_svc.runtime.randomness import GlobalRandom
from musicgen_svc.settings import Settings
from musicgen_svc.weights.catalog import read_catalog
from musicgen_svc.weights.paths import Weights

CPU = torch.device("cpu")
RATE = 32_000
Pretrained = Callable[[str], Any]


@pytest.fixture(scope="module")
def loaders(weights: Path) -> Callable[[str], Loader]:
    """`loaders(name)` gives one loader per model, so that no model is loaded twice."""
    made: dict[str, Loader] = {}

    def get(name: str) -> Loader:
        if name not in made:
            given = None if name in ("small", "melody") else str(weights / name)
            made[name] = Loader(Weights.at(weights, read_catalog(), given), CPU, Settings())
        return made[name]

    return get


def tune(seconds: float, channels: int = 1, pitch_hz: float = 220.0) -> torch.Tensor:
    """A melody [C, T] at 32 kHz, with other notes in each channel."""
    t = torch.arange(int(seconds * RATE)) / RATE
    notes = pitch_hz * 2 ** ((torch.floor(t * 2) * 5 % 12) / 12)
    return torch.stack([0.4 * torch.sin(2 * torch.pi * notes * (1 + c / 4) * t) for c in range(channels)])


def ours(
    loader: Loader, name: str, seed: int, *, prompt: str | None, seconds: float, sampling: SamplingParams,
    melody: torch.Tensor | None = None, clip: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    model = loader.model(name if name in ("small", "melody") else "finetuned")
    stream = GlobalRandom(seed, CPU)
    plan = prepare(
        model, prompt=prompt, frames=round(50 * seconds), melody=melody,
        clip_tokens=None if clip is None else model.codec.encode(clip), random=stream,
    )  # fmt: skip
    return generate(model, plan, sampling, torch.Generator().manual_seed(seed))[0]


def audiocrafts(
    model: Any, seed: int, *, prompt: str | None, seconds: float, sampling: SamplingParams,
    melody: torch.Tensor | None = None, clip: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    model.set_generation_params(
        duration=seconds, use_sampling=sampling.temperature > 0, top_k=sampling.top_k, top_p=sampling.top_p,
        temperature=sampling.temperature, cfg_coef=sampling.guidance,
    )  # fmt: skip
    random.seed(seed)
    torch.manual_seed(seed)
    if melody is not None:
        _, tokens = model.generate_with_chroma([prompt], melody[None], RATE, return_tokens=True)
    elif clip is not None:
        _, tokens = model.generate_continuation(clip, RATE, [prompt], return_tokens=True)
    else:
        _, tokens = model.generate([prompt], return_tokens=True)
    return tokens[0]


TEXT_CASES = [
    ("small", "rock guitar", 1, SamplingParams()),
    ("small", "a slow sad song", 3, SamplingParams(top_k=0, temperature=1.3, guidance=7)),
    ("small", "jazz", 2, SamplingParams(top_p=0.9, guidance=1)),
    ("small", "jazz", 2, SamplingParams(temperature=0, guidance=0)),
    ("stereo", "happy piano", 2, SamplingParams(top_k=50)),
    ("melody", "happy piano", 2, SamplingParams()),
    ("hf-codec", "drums", 1, SamplingParams(top_k=1)),
]


@pytest.mark.parametrize(("name", "prompt", "seconds", "sampling"), TEXT_CASES)
def test_tokens_for_a_text_are_audiocrafts(
    loaders: Callable[[str], Loader], pretrained: Pretrained,
    name: str, prompt: str, seconds: int, sampling: SamplingParams,
) -> None:  # fmt: skip
    expected = audiocrafts(pretrained(name), 5, prompt=prompt, seconds=seconds, sampling=sampling)
    tokens = ours(loaders(name), name, 5, prompt=prompt, seconds=seconds, sampling=sampling)
    assert torch.equal(tokens, expected)


LONG = SamplingParams(temperature=0.7)


@pytest.fixture(scope="module")
def long_pieces(pretrained: Pretrained) -> dict[int, torch.Tensor]:
    """audiocraft's tokens of one request for several lengths, by seconds.

    The pieces begin with the same windows. A window whose context and random state were seen before is not
    computed again.
    """
    model, prompt = pretrained("small"), "rock"
    generate = model.lm.generate
    computed: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}

    def remembered(context: torch.Tensor | None, conditions: Any, max_gen_len: int, **more: Any) -> Any:
        seen = None if context is None else context.numpy().tobytes()
        key = seen, max_gen_len, torch.get_rng_state().numpy().tobytes()
        if key not in computed:
            tokens = generate(context, conditions, max_gen_len=max_gen_len, **more)
            computed[key] = tokens, torch.get_rng_state()
        tokens, state = computed[key]
        torch.set_rng_state(state)
        return tokens

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.lm, "generate", remembered)
        patch.setattr(model, "generate_audio", lambda tokens: tokens)  # these tests need no audio
        pieces = {
            seconds: audiocrafts(model, 5, prompt=prompt, seconds=seconds, sampling=LONG)
            for seconds in (45, 49)
        }
    assert len(computed) == 2 + 2
    return pieces


@pytest.mark.parametrize("seconds", [45, 49])
def test_tokens_over_two_and_three_windows_are_audiocrafts(
    loaders: Callable[[str], Loader], long_pieces: dict[int, torch.Tensor], seconds: int
) -> None:
    tokens = ours(loaders("small"), "small", 5, prompt="rock", seconds=seconds, sampling=LONG)
    assert tokens.shape[1] == 50 * seconds
    assert torch.equal(tokens, long_pieces[seconds])


def test_three_requests_at_once_get_audiocrafts_tokens_for_each_alone(
    weights: Path, pretrained: Pretrained
) -> None:
    requests = [
        ("rock guitar", 1, 5, SamplingParams()),
        ("a slow sad song", 3, 6, SamplingParams(top_k=0, temperature=1.3, guidance=7)),
        ("jazz", 2, 7, SamplingParams(top_p=0.9, guidance=1)),
    ]
    model = Loader(
        Weights.at(weights, read_catalog(), None), CPU, Settings(slots=3, max_concurrency=3)
    ).model("small")
    plans = [
        prepare(model, prompt=prompt, frames=50 * seconds, melody=None, clip_tokens=None,
                    random=GlobalRandom(seed, CPU))
        for prompt, seconds, seed, _ in requests
    ]  # fmt: skip
    all_in = threading.Barrier(3)

    def run(plan: GenerationPlan, request: tuple[str, int, int, SamplingParams]) -> torch.Tensor:
        waited = False

        def tick(done: int, total: int) -> None:
            nonlocal waited
            if done and not waited:
                waited = True
                all_in.wait(60)

        return generate(model, plan, request[3], torch.Generator().manual_seed(request[2]), tick)[0]

    with ThreadPoolExecutor(3) as threads:
        generated = list(threads.map(run, plans, requests))
    for tokens, (prompt, seconds, seed, sampling) in zip(generated, requests, strict=True):
        expected = audiocrafts(pretrained("small"), seed, prompt=prompt, seconds=seconds, sampling=sampling)
        assert torch.equal(tokens, expected)


@pytest.mark.parametrize(
    ("clip_s", "seconds", "prompt"), [(3.01, 2, "rock"), (5.0, 31, None), (40.0, 1, "jazz")]
)
def test_tokens_for_a_melody_are_audiocrafts(
    loaders: Callable[[str], Loader], pretrained: Pretrained, clip_s: float, seconds: int, prompt: str | None
) -> None:
    """The melody is shorter than the window, repeated over two windows, or longer than the window."""
    sampling, clip = SamplingParams(), tune(clip_s)
    expected = audiocrafts(
        pretrained("melody"), 9, prompt=prompt, seconds=seconds, sampling=sampling, melody=clip
    )
    tokens = ours(
        loaders("melody"), "melody", 9, prompt=prompt, seconds=seconds, sampling=sampling, melody=clip
    )
    assert torch.equal(tokens, expected)


def test_separating_the_melody_alone_gives_audiocrafts_tokens(
    loaders: Callable[[str], Loader], pretrained: Pretrained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """audiocraft also separates the silence of the null row, with a Demucs that normalizes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        demucs = Demucs(
            ["drums", "bass", "other", "vocals"],
            channels=8,
            depth=2,
            lstm_layers=0,
            resample=False,
            segment=5,
        )
    bag = BagOfModels([demucs]).eval()
    model, name = pretrained("melody"), MELODY
    monkeypatch.setitem(model.lm.condition_provider.conditioners[name].__dict__, "demucs", bag)
    conditioner = loaders("melody").model("melody").conditioner.conditioners[name]
    separator = Separator(bag, RATE)
    monkeypatch.setattr(conditioner, "_separate", separator)
    sampling, clip = SamplingParams(guidance=7), tune(12.0)
    expected = audiocrafts(model, 4, prompt="rock", seconds=2, sampling=sampling, melody=clip)
    rows: list[int] = []
    demucs.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    tokens = ours(loaders("melody"), "melody", 4, prompt="rock", seconds=2, sampling=sampling, melody=clip)
    assert torch.equal(tokens, expected)
    assert set(rows) == {1}
    chroma = conditioner(clip)[0][0]
    assert chroma.unique(dim=0).shape[0] > 3, "a melody of one note proves nothing"


def test_another_melody_gives_other_tokens(loaders: Callable[[str], Loader]) -> None:
    sampling = SamplingParams(temperature=0)
    tokens = [
        ours(loaders("melody"), "melody", 0, prompt=None, seconds=2, sampling=sampling, melody=tune(3, 1, hz))
        for hz in (220.0, 311.0)
    ]
    assert not torch.equal(*tokens)


@pytest.mark.parametrize(
    ("name", "clip_s", "seconds", "prompt"),
    [
        ("small", 1.01, 2, "rock"),
        ("stereo", 2.0, 1, None),
        ("melody", 1.5, 1, "jazz"),
        ("small", 12.3, 19, "slow"),
        ("small", 20.0, 9.98, "rock"),
        ("small", 20.0, 10, "rock"),
    ],
)
def test_tokens_that_continue_a_clip_are_audiocrafts(
    loaders: Callable[[str], Loader], pretrained: Pretrained,
    name: str, clip_s: float, seconds: float, prompt: str | None,
) -> None:  # fmt: skip
    """The piece is shorter than the window, by one frame, as long as the window, or longer."""
    sampling, clip = SamplingParams(), tune(clip_s, 2 if name == "stereo" else 1)
    frames = -(-clip.shape[1] // 640) + round(50 * seconds)
    total_s = (frames + 0.25) / 50  # audiocraft rounds float seconds down to frames
    expected = audiocrafts(pretrained(name), 3, prompt=prompt, seconds=total_s, sampling=sampling, clip=clip)
    tokens = ours(loaders(name), name, 3, prompt=prompt, seconds=seconds, sampling=sampling, clip=clip)
    assert torch.equal(tokens, expected)


def test_a_clip_longer_than_the_window_is_kept_and_its_last_12_s_are_continued(
    loaders: Callable[[str], Loader], pretrained: Pretrained
) -> None:
    loader, clip, sampling = loaders("small"), tune(31), SamplingParams()
    tokens = ours(loader, "small", 3, prompt="rock", seconds=2, sampling=sampling, clip=clip)
    known = loader.model("small").codec.encode(clip)
    assert tokens.shape == (4, known.shape[1] + 100)
    assert torch.equal(tokens[:, : known.shape[1]], known)
    model = pretrained("small")
    model.set_generation_params(duration=14)
    attributes, _ = model._prepare_tokens_and_attributes(["rock"], None)
    random.seed(3)
    torch.manual_seed(3)
    expected = model._generate_tokens(attributes, known[None, :, -600:])
    assert torch.equal(tokens[:, -700:], expected[0])


def test_a_top_k_above_the_codebooks_size_keeps_all_tokens(loaders: Callable[[str], Loader]) -> None:
    """audiocraft raises an error."""
    runs = [
        ours(loaders("small"), "small", 1, prompt="rock", seconds=1, sampling=SamplingParams(top_k=k))
        for k in (100_000, 400)
    ]
    assert torch.equal(*runs)


def test_another_seed_gives_other_tokens(loaders: Callable[[str], Loader]) -> None:
    runs = [
        ours(loaders("small"), "small", s, prompt="rock", seconds=1, sampling=SamplingParams())
        for s in (0, 1)
    ]
    assert not torch.equal(*runs)
