"""The gain of live audio is slow, knows no later sample, and leaves no sample outside (-1, 1)."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from musicgen_svc.audio.live_gain import (
    CEILING_DB,
    GAIN_DB,
    KNEE,
    RATE_DB_S,
    TARGET_RMS_DB,
    LiveGain,
    limited,
)

RATE = 400
"""Hz: so low that parts of seconds have few samples."""
levels = st.floats(0, 1e6) | st.floats(0, 1)
parts_of_audio = st.lists(st.tuples(levels, st.integers(1, 3 * RATE)), min_size=1, max_size=8)
"""Parts of noise: the level of each, and its length in samples."""


def noise(parts: list[tuple[float, int]], channels: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [level * torch.randn(channels, n, generator=generator) for level, n in parts]


@settings(max_examples=60, deadline=None)
@given(parts_of_audio, st.sampled_from([1, 2]))
def test_no_sample_reaches_full_scale(parts: list[tuple[float, int]], channels: int) -> None:
    gain = LiveGain(RATE)
    for part in noise(parts, channels):
        out = gain.apply(part)
        assert out.shape == part.shape and out.abs().max() < 1


@settings(max_examples=60, deadline=None)
@given(parts_of_audio)
def test_the_gain_changes_by_at_most_three_decibels_a_second(parts: list[tuple[float, int]]) -> None:
    gain = LiveGain(RATE)
    gains = torch.cat([gain.gains_db(part) for part in noise(parts)])
    assert RATE_DB_S == 3
    rounding = 1e-5
    assert gains.diff().abs().max() <= 3 / RATE + rounding if len(gains) > 1 else True
    for seconds in (1, 2):
        apart = gains[seconds * RATE :] - gains[: max(0, len(gains) - seconds * RATE)]
        assert (apart.abs() <= 3 * seconds + rounding).all()


@settings(max_examples=40, deadline=None)
@given(parts_of_audio, st.integers(1, 8))
def test_a_part_does_not_depend_on_later_ones(parts: list[tuple[float, int]], heard: int) -> None:
    whole, some = LiveGain(RATE), LiveGain(RATE)
    everything = [whole.apply(part) for part in noise(parts)]
    for one, other in zip([some.apply(part) for part in noise(parts)[:heard]], everything, strict=False):
        assert torch.equal(one, other)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e9, 1e9, width=32), min_size=2, max_size=50))
def test_the_limiter_keeps_the_order_of_samples_and_what_is_below_the_knee(values: list[float]) -> None:
    samples = torch.tensor(sorted(values))
    out = limited(samples)
    assert (out.diff() >= 0).all() and out.abs().max() < 1
    assert torch.equal(out[samples.abs() <= KNEE], samples[samples.abs() <= KNEE])


@pytest.mark.parametrize("level_db", [-26.0, -17.0, -10.0])
def test_steady_music_is_played_at_the_target_from_its_first_sample(level_db: float) -> None:
    wave = math.sqrt(2) * 10 ** (level_db / 20) * torch.sin(torch.arange(4 * RATE) * 0.7)[None]
    gain = LiveGain(RATE)
    for part in wave.split(RATE, 1):  # type: ignore[no-untyped-call]
        rms_db = 10 * math.log10(gain.apply(part).pow(2).mean())
        assert rms_db == pytest.approx(TARGET_RMS_DB, abs=0.3)


def test_the_gain_is_bounded_and_leaves_the_peaks_below_the_ceiling() -> None:
    whisper = 0.005 * torch.sin(torch.arange(RATE) * 0.7)[None]
    assert LiveGain(RATE).gains_db(whisper)[0] == pytest.approx(GAIN_DB)
    clicks = torch.zeros(1, RATE)
    clicks[0, ::50] = 0.8
    assert LiveGain(RATE).gains_db(clicks)[0] == pytest.approx(CEILING_DB - 20 * math.log10(0.8), abs=1e-4)


def test_silence_stays_silent_and_does_not_raise_the_gain_of_what_follows() -> None:
    gain = LiveGain(RATE)
    assert torch.equal(gain.apply(torch.zeros(1, 5 * RATE)), torch.zeros(1, 5 * RATE))
    assert gain.gains_db(0.05 * torch.ones(1, 1))[0].abs() <= 3 / RATE + 1e-6
