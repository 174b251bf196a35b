"""Which tune is it, where in the tune, and on what: judged from samples alone."""

from dataclasses import dataclass

import librosa
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.synth import HOP, SAMPLE_RATE, TIMBRES, looped, pitches, render
from training.tunes import SONGS, Notes, random_tune

Array = NDArray[np.float64]

FRAME = 3 * HOP  # of the scorer's chroma: an eighth note is four
FFT = 4096
TOLERANCE = 2  # frames, 0.12 s
TIE = 0.04  # passages that a tune repeats are as good as one another
KEPT = 0.8  # of 0.97 that a true rendering gets: a sixth of it may be something else, or nothing


@dataclass(frozen=True)
class Match:
    """The tune that fits best, where it begins in it, and how well: mean cosine of chroma, 0 to 1."""

    name: str
    lag: int
    score: float


def chroma(wav: Array) -> Array:
    """Samples [T] -> unit chroma vectors [S, 12], one each `FRAME` samples; silence is zero."""
    found = librosa.feature.chroma_stft(
        y=wav.astype(np.float32), sr=SAMPLE_RATE, n_fft=FFT, hop_length=FRAME, tuning=0.0, norm=None
    ).T
    length = np.linalg.norm(found, axis=1, keepdims=True)
    loud = length > 1e-4 * max(float(length.max()), 1e-9)
    unit: Array = np.where(loud, found / np.maximum(length, 1e-9), 0.0).astype(np.float64)
    return unit


def written(notes: Notes, frames: int) -> Array:
    """The chroma that a score asks for, [frames, 12], the tune over and over."""
    codec_frames = pitches(looped(notes, 3 * frames + 1))[::3][:frames]
    classes: Array = np.eye(12)[codec_frames.numpy() % 12]
    return classes


def best_match(wav: Array, tunes: dict[str, Notes]) -> Match:
    """The best of all tunes and all places to begin in them."""
    found = chroma(wav)
    return max((_aligned(found, name, notes) for name, notes in tunes.items()), key=lambda match: match.score)


def agreement(wav: Array, notes: Notes, start: int = 0) -> float:
    """How well samples follow a tune from its codec frame `start` on, 0 to 1; a small shift is free."""
    found = chroma(wav)
    scores = _scores(found, notes)
    around = [(round(start / 3) + shift) % len(scores) for shift in range(-TOLERANCE, TOLERANCE + 1)]
    return float(max(scores[place] for place in around))


def goes_on_right(wav: Array, name: str, start: int, tunes: dict[str, Notes]) -> bool:
    """Whether the tune is `name`, and goes on from its codec frame `start`, or from a passage like it, to the
    end of the samples.
    """
    match = best_match(wav, tunes)
    return match.name == name and agreement(wav, tunes[name], start) >= max(match.score - TIE, KEPT)


def similarity(a: Array, b: Array) -> float:
    """Mean cosine of two recordings' chroma, at the best of small shifts."""
    one, other = chroma(a), chroma(b)
    length = min(len(one), len(other)) - TOLERANCE
    shifted = [(one[s : s + length], other[:length]) for s in range(TOLERANCE + 1)]
    shifted += [(one[:length], other[s : s + length]) for s in range(1, TOLERANCE + 1)]
    return float(max((x * y).sum(1).mean() for x, y in shifted))


def shuffled_p(outputs: list[Array], clips: list[Array], rounds: int = 10_000) -> tuple[float, float, float]:
    """Permutation test that outputs follow their clips: mean similarity of pairs, of shuffled ones, p."""
    table = np.array([[similarity(output, clip) for clip in clips] for output in outputs])
    draw = np.random.default_rng(0)
    own = float(table.diagonal().mean())
    rows = np.arange(len(table))
    shuffled = np.array([table[rows, draw.permutation(len(table))].mean() for _ in range(rounds)])
    return own, float(shuffled.mean()), float((1 + (shuffled >= own).sum()) / (1 + rounds))


class TimbreClassifier:
    """The nearest of the timbres' mean spectra, learned from renderings of random tunes."""

    def __init__(self) -> None:
        self._means = {
            timbre: np.mean(
                [_spectrum(_numpy(render(random_tune(f"ear {n}", 12).notes, timbre))) for n in range(8)], 0
            )
            for timbre in TIMBRES
        }

    def __call__(self, wav: Array) -> str:
        found = _spectrum(wav)
        return min(self._means, key=lambda timbre: float(np.linalg.norm(found - self._means[timbre])))


def songs() -> dict[str, Notes]:
    return {song.name: song.notes for song in SONGS}


def _spectrum(wav: Array) -> Array:
    """Mean log energy of 32 mel bands; their own mean, the level, taken off."""
    energy = librosa.feature.melspectrogram(
        y=wav.astype(np.float32), sr=SAMPLE_RATE, n_fft=FFT, hop_length=FRAME, n_mels=32, fmin=200.0
    ).mean(1)
    log = np.log10(energy + 1e-4 * energy.max()).astype(np.float64)
    centred: Array = log - log.mean()
    return centred


def _aligned(found: Array, name: str, notes: Notes) -> Match:
    scores = _scores(found, notes)
    lag = int(np.argmax(scores))
    return Match(name, lag, float(scores[lag]))


def _scores(found: Array, notes: Notes) -> Array:
    """The mean cosine for each place of the tune to begin at, [places]; silence agrees with nothing."""
    places = len(pitches(notes)) // 3
    score = written(notes, places + len(found))
    return np.array([(found * score[lag : lag + len(found)]).sum(1).mean() for lag in range(places)])


def _numpy(wav: Tensor) -> Array:
    return wav.to(torch.float64).numpy()
