"""audiocraft itself loads the tiny checkpoints, and each input that a test may change has an effect."""

import filecmp
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fixtures import tiny_weights

Pretrained = Callable[[str], Any]
TEXT_MODELS = ["small", "stereo", "hf-codec"]


def _generate(model: Any, prompt: str, **parameters: Any) -> tuple[torch.Tensor, torch.Tensor]:
    model.set_generation_params(duration=1, **parameters)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        wav, tokens = model.generate([prompt], return_tokens=True)
    return wav, tokens


def _melody_tokens(model: Any, pitch_hz: float) -> torch.Tensor:
    model.set_generation_params(duration=1, use_sampling=False)
    time_s = torch.arange(2 * 32_000) / 32_000
    wav = 0.3 * torch.sin(2 * torch.pi * pitch_hz * time_s)
    tokens: torch.Tensor = model.generate_with_chroma(["rock"], [wav[None]], 32_000, return_tokens=True)[1]
    return tokens


def _differ(first: torch.Tensor, second: torch.Tensor) -> float:
    return (first != second).float().mean().item()


@pytest.mark.parametrize("name", [*TEXT_MODELS, "melody"])
def test_audiocraft_loads_it_and_its_audio_has_a_plausible_level(pretrained: Pretrained, name: str) -> None:
    wav, tokens = _generate(pretrained(name), "happy rock")
    stereo = name == "stereo"
    assert wav.shape == (1, 1 + stereo, 32_000)
    assert tokens.shape == (1, 8 if stereo else 4, 50)
    assert tokens.unique().numel() > 30
    assert 0.02 < wav.std() < 0.3
    assert wav.mean().abs() < 0.01


@pytest.mark.parametrize("name", [*TEXT_MODELS, "melody"])
def test_prompt_guidance_and_seed_change_the_tokens(pretrained: Pretrained, name: str) -> None:
    model = pretrained(name)
    rock = _generate(model, "happy rock", use_sampling=False)[1]
    assert _differ(rock, _generate(model, "sad piano music", use_sampling=False)[1]) > 0.5
    assert _differ(rock, _generate(model, "happy rock", use_sampling=False, cfg_coef=1.0)[1]) > 0.3
    assert _differ(rock, _generate(model, "happy rock")[1]) > 0.3


def test_the_melody_changes_the_tokens(pretrained: Pretrained) -> None:
    model = pretrained("melody")
    assert _differ(_melody_tokens(model, 392.0), _melody_tokens(model, 587.3)) > 0.5


def test_demucs_puts_the_whole_signal_into_a_stem_that_the_melody_uses(pretrained: Pretrained) -> None:
    demucs = pretrained("melody").lm.condition_provider.conditioners["self_wav"].demucs.models[0]
    mix = torch.randn(1, 2, 44_101)
    with torch.no_grad():
        stems = dict(zip(demucs.sources, demucs(mix)[0], strict=True))
    torch.testing.assert_close(stems["other"], mix[0])
    assert all(not stem.any() for name, stem in stems.items() if name != "other")


@pytest.mark.parametrize("name", ["small", "hf-codec"])
def test_the_codec_depends_on_its_input_and_on_frames_long_before(pretrained: Pretrained, name: str) -> None:
    codec = pretrained(name).compression_model
    time_s = torch.arange(3 * 32_000) / 32_000
    low, high = (0.3 * torch.sin(2 * torch.pi * hz * time_s)[None, None] for hz in (220, 440))
    assert _differ(codec.encode(low)[0], codec.encode(high)[0]) > 0.5

    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(codec.cardinality, (1, 4, 150), generator=generator)
    other = codes.clone()
    other[..., :2] = (other[..., :2] + 1) % codec.cardinality
    with torch.no_grad():
        difference = (codec.decode(codes) - codec.decode(other)).abs()[0, 0]
    assert difference[100 * 640 :].max() > 1e-3, "the first two frames have no effect after two seconds"


def test_the_same_source_gives_the_same_bytes_whatever_the_callers_random_state(
    weights: Path, tmp_path: Path
) -> None:
    torch.rand(1)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    tiny_weights.build(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads

    files = sorted(path.relative_to(weights) for path in weights.rglob("*") if path.is_file())
    again = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert files == again
    assert [file for file in files if not filecmp.cmp(weights / file, tmp_path / file, shallow=False)] == []
    assert sum((weights / file).stat().st_size for file in files) < 16_000_000
