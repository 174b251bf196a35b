"""The four strategies reach audiocraft's levels by an independent meter, also for extreme signals."""

import math
from typing import get_args

import numpy as np
import pyloudnorm
import pytest
import torch
import torchaudio
from hypothesis import given
from hypothesis import strategies as st
from sounds import noise, tone

import musicgen_svc.audiocraft_compat  # noqa: F401  (before audiocraft)
from musicgen_svc.audio.loudness import (
    CHUNK_HOPS,
    ENERGY_FLOOR,
    HOP_S,
    KNEE,
    Strategy,
    _limit_,
    measure_lufs,
    normalize,
)

RATE = 32_000
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


def db(amplitude: float) -> float:
    return 20 * math.log10(amplitude)


def lufs(samples: torch.Tensor, rate: int = RATE) -> float:
    return float(pyloudnorm.Meter(rate).integrated_loudness(samples.T.double().numpy()))


def peak(samples: torch.Tensor) -> float:
    return float(samples.abs().max())


def rms(samples: torch.Tensor) -> float:
    return float(samples.double().square().mean().sqrt())


def music(channels: int = 1, duration_s: float = 5, level: float = 1.0, rate: int = RATE) -> torch.Tensor:
    """Makes a swelling chord with a little noise, which at -14 LUFS is below the limiter's knee."""
    notes_hz = (110, 277, 330, 1760, 5000)
    chord = sum(tone(hz, duration_s, rate, channels=channels, level=0.05) for hz in notes_hz)
    swell = 0.7 + 0.3 * np.sin(2 * np.pi * 0.7 * np.arange(round(duration_s * rate)) / rate)
    sound = chord * swell + noise(duration_s, rate, channels=channels, rms=0.004)
    return torch.from_numpy(level * sound).float()


def spiky(exponent: int) -> torch.Tensor:
    """Makes a 50 Hz sine to an odd power: the larger the exponent, the narrower the peaks."""
    return torch.from_numpy(tone(50, 3, RATE, level=1) ** exponent)


@pytest.mark.parametrize("rate", [24_000, 32_000, 44_100, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("level", [0.05, 1, 300])
def test_loudness_reaches_its_target_where_nothing_is_limited(rate: int, channels: int, level: float) -> None:
    output = normalize(music(channels, level=level, rate=rate), rate, "loudness")
    assert peak(output) < KNEE
    assert lufs(output, rate) == pytest.approx(-14, abs=0.05)


@pytest.mark.parametrize("exponent", [41, 61, 81, 101])
def test_what_fits_below_full_scale_loses_less_than_half_a_lu(exponent: int) -> None:
    sound = spiky(exponent)
    plain = sound * 10 ** ((-14 - lufs(sound)) / 20)
    assert KNEE < peak(plain) <= 1
    assert lufs(normalize(sound, RATE, "loudness")) == pytest.approx(-14, abs=0.5)


@pytest.mark.parametrize("exponent", [201, 301, 1001])
def test_limiting_is_soft_and_changes_nothing_below_the_knee(exponent: int) -> None:
    sound = spiky(exponent)
    output = normalize(sound, RATE, "loudness")
    plain = sound * 10 ** ((-14 - lufs(sound)) / 20)
    assert peak(plain) > 1.1
    below, above = plain.abs() < KNEE, plain.abs() > KNEE + 0.05
    torch.testing.assert_close(output[below], plain[below], rtol=2e-3, atol=1e-6)
    assert (output[above].abs() < plain[above].abs()).all()
    order = plain[0].argsort()
    assert (output[0, order].diff() >= 0).all(), "the curve must be monotonic"
    assert output[plain > 1].unique().numel() > 2, "peaks keep their shape"
    assert peak(output) <= 1
    assert lufs(output) < -14.01


def test_the_limiter_bends_without_a_kink() -> None:
    """The slope is 1 up to the knee and falls continuously from there. A corner would add harsh overtones."""
    ramp = torch.linspace(-3, 3, 6001, dtype=torch.float64)[None]
    bent = ramp.clone()
    _limit_(bent)
    slope = bent.diff() / ramp.diff()
    assert slope[ramp[:, 1:].abs() < KNEE].sub(1).abs().max() < 1e-4
    assert slope.diff().abs().max() < 0.01
    assert (slope >= 0).all()
    torch.testing.assert_close(bent, -bent.flip(1))
    assert 0.999 < peak(bent) <= 1


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_levels_are_audiocrafts(strategy: Strategy, channels: int) -> None:
    from audiocraft.data.audio_utils import normalize_audio

    sound = music(channels, level=2)
    expected = normalize_audio(sound.clone(), strategy=strategy, sample_rate=RATE)
    torch.testing.assert_close(normalize(sound, RATE, strategy), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("duration_s", [0.4, 0.5, 3, 2 * CHUNK_HOPS * HOP_S, 17.37])
@pytest.mark.parametrize("rate", [11_025, 32_000, 48_000])
def test_the_meter_agrees_with_others(duration_s: float, rate: int) -> None:
    """Also for signals of several chunks, and with silent and quiet parts that the gates exclude."""
    sound = torch.from_numpy(noise(duration_s, rate, channels=2, rms=0.05))
    sound[:, sound.shape[1] // 2 :] *= 0.003
    sound[:, -sound.shape[1] // 6 :] = 0
    sound += 0.4  # an offset, which only filters that have settled remove
    assert measure_lufs(sound, rate) == pytest.approx(lufs(sound, rate), abs=0.05)
    theirs = float(torchaudio.functional.loudness(sound, rate))
    assert measure_lufs(sound, rate) == pytest.approx(theirs, abs=0.05)


def test_the_meter_is_right_where_torchaudio_clips() -> None:
    sound = torch.from_numpy(noise(3, RATE, rms=0.8))
    clipped = float(torchaudio.functional.loudness(sound, RATE))
    assert clipped < lufs(sound) - 2, "torchaudio no longer clips: remove the headroom"
    assert measure_lufs(sound, RATE) == pytest.approx(lufs(sound), abs=0.05)


def test_rms_is_that_of_the_downmix_and_clips_at_full_scale() -> None:
    output = normalize(music(2), RATE, "rms")
    assert db(rms(output.mean(0))) == pytest.approx(-18, abs=0.01)
    pulses = normalize(spiky(9001), RATE, "rms")
    assert peak(pulses) == 1


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("level", [0.01, 1, 7])
def test_peak_and_clip_stop_at_minus_one_db(channels: int, level: float) -> None:
    sound = music(channels, level=level)
    sound[-1, 70_000] = -1.7 * peak(sound)  # the highest peak is a negative one
    assert db(peak(normalize(sound, RATE, "peak"))) == pytest.approx(-1, abs=1e-4)
    clipped = normalize(sound, RATE, "clip")
    assert peak(clipped) == pytest.approx(min(peak(sound), 10 ** (-1 / 20)))
    quiet = sound.abs() < 0.89
    assert clipped[quiet].equal(sound[quiet])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("length", [0, 1, 100, 12_799, 12_800, 100_000])
@pytest.mark.parametrize("level", [0, 1e-45, 1e-30, 1e-6])
def test_silence_stays_silence(strategy: Strategy, length: int, level: float) -> None:
    sound = torch.full((2, length), float(level))
    sound[:, ::2] *= -1
    assert normalize(sound, RATE, strategy).equal(sound)


@pytest.mark.parametrize("duration_s", [0.05, 0.1, 0.2, 0.399])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_clip_shorter_than_a_gating_block_gets_the_level_of_a_long_one(
    duration_s: float, channels: int
) -> None:
    short, long = (
        normalize(torch.from_numpy(tone(500, s, RATE, channels=channels, level=0.05)), RATE, "loudness")
        for s in (duration_s, 4)
    )
    assert db(rms(short)) == pytest.approx(db(rms(long)), abs=0.5)


@pytest.mark.parametrize(("share", "scaled"), [(0.99, False), (1.01, True)])
def test_background_noise_is_not_amplified(share: float, scaled: bool) -> None:
    sound = music()
    sound *= share * ENERGY_FLOOR / rms(sound)
    output = normalize(sound, RATE, "loudness")
    assert output.equal(sound) is not scaled
    assert not scaled or lufs(output) == pytest.approx(-14, abs=0.05)


@pytest.mark.parametrize("hz", [0.2, 0.5])
def test_inaudible_frequencies_are_not_amplified(hz: float) -> None:
    """The gates exclude all of it, and the gain for silence would be infinite."""
    sound = torch.from_numpy(tone(hz, 10, RATE, level=0.1))
    assert rms(sound) > ENERGY_FLOOR
    assert math.isnan(float(torchaudio.functional.loudness(sound, RATE)))
    assert normalize(sound, RATE, "loudness").equal(sound)


@pytest.mark.parametrize("width", [0.9, 0.999, 1])
def test_channels_that_cancel_each_other_are_not_amplified(width: float) -> None:
    """The downmix is nearly silent. audiocraft divides by its level, which may be zero."""
    left = music()
    sound = torch.cat([left, left * (1 - 2 * width)])
    output = normalize(sound, RATE, "rms")
    assert db(rms(output)) < -11.9
    assert (output.abs() == 1).float().mean() < 0.01


@given(
    channels=st.integers(1, 2),
    length=st.integers(1, 20_000),
    level=st.floats(1e-38, 1e30),
    offset=st.floats(-2, 2),
    spike=st.floats(1, 1e6),
    strategy=st.sampled_from(STRATEGIES),
    rate=st.sampled_from([8_000, 32_000]),
)
def test_output_is_finite_and_within_full_scale_for_any_input(
    channels: int, length: int, level: float, offset: float, spike: float, strategy: Strategy, rate: int
) -> None:
    sound = torch.from_numpy(noise(1, length, channels=channels)) + offset
    sound[0, length // 2] *= spike
    sound *= level
    before = sound.clone()
    output = normalize(sound, rate, strategy)
    assert output.shape == sound.shape
    assert output.dtype == torch.float32
    assert output.isfinite().all()
    assert peak(output) <= 1
    assert sound.equal(before), "the input was changed"


def test_samples_that_are_not_finite_fail_an_assertion() -> None:
    for value in (math.nan, math.inf):
        with pytest.raises(AssertionError, match="finite"):
            normalize(torch.tensor([[0.1, value]]), RATE, "clip")


def test_measuring_reports_and_can_be_stopped() -> None:
    sound, calls = music(duration_s=3 * CHUNK_HOPS * HOP_S), []
    normalize(sound, RATE, "loudness", tick=lambda done, total: calls.append((done, total)))
    assert calls == [(CHUNK_HOPS * i, CHUNK_HOPS * 3) for i in (1, 2, 3)]

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        normalize(sound, RATE, "loudness", tick=stop)


def test_an_offset_neither_counts_as_sound_nor_is_amplified() -> None:
    hiss = torch.from_numpy(noise(3, RATE, rms=ENERGY_FLOOR / 4))
    assert torch.equal(normalize(hiss + 0.01, RATE, "loudness"), hiss + 0.01)
    constant = torch.full((2, 3 * RATE), 0.5)
    assert torch.equal(normalize(constant, RATE, "loudness"), constant)
    sound = music(level=0.1)
    output = normalize(sound + 0.1, RATE, "loudness")
    assert abs(float(output.mean())) < 1e-3
    torch.testing.assert_close(output, normalize(sound, RATE, "loudness"), atol=1e-2, rtol=0)
    loud = normalize(music(level=300) + 0.1, RATE, "loudness")
    torch.testing.assert_close(loud, normalize(music(level=300), RATE, "loudness"), atol=1e-2, rtol=0)
