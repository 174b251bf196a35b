"""Recognizes the tune, the position in it and the timbre of a piece from its samples alone."""

from dataclasses import dataclass

import librosa
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.synth import HOP, SAMPLE_RATE, TIMBRES, looped, pitches, render
from training.tunes import SONGS, Notes, random_tune

Array = NDArray[np.float64]

FRAME = 3 * HOP  # samples of a chroma frame of the scoring; an eighth note has four frames
FFT = 4096
TOLERANCE = 2  # frames, 0.12 s
TIE_MARGIN = 0.04  # a tune may repeat a passage; scores that differ by less are equally good
MIN_AGREEMENT = 0.8  # a true rendering gets 0.97, so a sixth of it may be something else, or silence


@dataclass(frozen=True)
class Match:
    """The tune that fits a piece best."""

    name: str
    lag: int
    """The frame of the tune at which the piece begins."""
    score: float
    """The mean cosine of the chroma vectors, 0 to 1."""


def chroma(wav: Array) -> Array:
    """Computes chroma: [T] -> unit vectors [S, 12], one per `FRAME` samples; silence is zero."""
    found = librosa.feature.chroma_stft(
        y=wav.astype(np.float32), sr=SAMPLE_RATE, n_fft=FFT, hop_length=FRAME, tuning=0.0, norm=None
    ).T
    length = np.linalg.norm(found, axis=1, keepdims=True)
    loud = length > 1e-4 * max(float(length.max()), 1e-9)
    unit: Array = np.where(loud, found / np.maximum(length, 1e-9), 0.0).astype(np.float64)
    return unit


def score_chroma(notes: Notes, frames: int) -> Array:
    """Returns the chroma of a tune's notes, repeated up to this length: [frames, 12]."""
    codec_frames = pitches(looped(notes, 3 * frames + 1))[::3][:frames]
    classes: Array = np.eye(12)[codec_frames.numpy() % 12]
    return classes


def best_match(wav: Array, tunes: dict[str, Notes]) -> Match:
    """Returns the best match among all tunes and all positions in them."""
    found = chroma(wav)
    return max((_aligned(found, name, notes) for name, notes in tunes.items()), key=lambda match: match.score)


def agreement(wav: Array, notes: Notes, start: int = 0) -> float:
    """Returns how well samples follow a tune from its codec frame `start` on, 0 to 1.

    It is the best value for shifts of up to `TOLERANCE` frames.
    """
    found = chroma(wav)
    scores = _scores(found, notes)
    around = [(round(start / 3) + shift) % len(scores) for shift in range(-TOLERANCE, TOLERANCE + 1)]
    return float(max(scores[position] for position in around))


def continues_correctly(wav: Array, name: str, start: int, tunes: dict[str, Notes]) -> bool:
    """Tells whether samples are the tune `name` from its codec frame `start` on, up to their end.

    A passage that is the same as the one at `start` is accepted too.
    """
    match = best_match(wav, tunes)
    least = max(match.score - TIE_MARGIN, MIN_AGREEMENT)
    return match.name == name and agreement(wav, tunes[name], start) >= least


def similarity(a: Array, b: Array) -> float:
    """Returns the mean cosine of two pieces' chroma, for the best shift of up to `TOLERANCE` frames."""
    one, other = chroma(a), chroma(b)
    length = min(len(one), len(other)) - TOLERANCE
    shifted = [(one[s : s + length], other[:length]) for s in range(TOLERANCE + 1)]
    shifted += [(one[:length], other[s : s + length]) for s in range(1, TOLERANCE + 1)]
    return float(max((x * y).sum(1).mean() for x, y in shifted))


def shuffled_p(outputs: list[Array], clips: list[Array], rounds: int = 10_000) -> tuple[float, float, float]:
    """Tests with random permutations whether outputs follow their clips.

    Returns:
        The mean similarity of an output with its own clip, that with another clip, and the p-value.
    """
    table = np.array([[similarity(output, clip) for clip in clips] for output in outputs])
    draw = np.random.default_rng(0)
    own = float(table.diagonal().mean())
    rows = np.arange(len(table))
    shuffled = np.array([table[rows, draw.permutation(len(table))].mean() for _ in range(rounds)])
    return own, float(shuffled.mean()), float((1 + (shuffled >= own).sum()) / (1 + rounds))


class TimbreClassifier:
    """Finds the timbre whose mean spectrum is nearest, as measured on renderings of random tunes."""

    def __init__(self) -> None:
        self._means = {
            timbre: np.mean(
                [_spectrum(_numpy(render(random_tune(f"ear {n}", 12).notes, timbre))) for n in range(8)], 0
            )
            for timbre in TIMBRES
        }

    def __call__(self, wav: Array) -> str:
        """Returns the name of the timbre of samples [T]."""
        found = _spectrum(wav)
        return min(self._means, key=lambda timbre: float(np.linalg.norm(found - self._means[timbre])))


def songs() -> dict[str, Notes]:
    """Returns the notes of the eight songs by their names."""
    return {song.name: song.notes for song in SONGS}


def _spectrum(wav: Array) -> Array:
    """Returns the mean log energy of 32 mel bands, minus the mean over the bands: [T] -> [32]."""
    energy = librosa.feature.melspectrogram(
        y=wav.astype(np.float32), sr=SAMPLE_RATE, n_fft=FFT, hop_length=FRAME, n_mels=32, fmin=200.0
    ).mean(1)
    log = np.log10(energy + 1e-4 * energy.max()).astype(np.float64)
    centred: Array = log - log.mean()
    return centred


def _aligned(found: Array, name: str, notes: Notes) -> Match:
    """Returns the best match of chroma [S, 12] with one tune."""
    scores = _scores(found, notes)
    lag = int(np.argmax(scores))
    return Match(name, lag, float(scores[lag]))


def _scores(found: Array, notes: Notes) -> Array:
    """Returns the mean cosine of chroma [S, 12] with the tune from each of its frames on: [frames].

    Silence has a cosine of 0 with everything.
    """
    frames = len(pitches(notes)) // 3
    score = score_chroma(notes, frames + len(found))
    return np.array([(found * score[lag : lag + len(found)]).sum(1).mean() for lag in range(frames)])


def _numpy(wav: Tensor) -> Array:
    """Converts samples to float64."""
    return wav.to(torch.float64).numpy()
