"""The pitch classes of a sound over time: audiocraft's chroma, with filters of our own.

audiocraft has its filters from librosa, which brings scipy and numba along: importing the three takes
longer than loading a melody model does, and the null melody needs the filters before any melody is heard.
"""

import math

import numpy as np
import torch
import torchaudio
from torch import nn

from musicgen_svc.audiocraft_compat import ChromaExtractor

LOWEST_A_HZ = 27.5
LOUDEST_OCTAVE, OCTAVES_AROUND = 5, 2
"""Above that A: what lies there counts most, and what lies two octaves away from it 0.61 of that."""


class Chroma(ChromaExtractor):  # type: ignore[misc]
    """[B, 1, T] at `sample_rate` -> [B, S, N]. What it computes and its weights' names are audiocraft's."""

    def __init__(
        self, sample_rate: int, *, n_chroma: int, radix2_exp: int, nfft: int | None = None,
        winlen: int | None = None, winhop: int | None = None, argmax: bool = False, norm: float = math.inf,
    ) -> None:  # fmt: skip
        """Lengths in samples; `argmax`: of each frame only the loudest class is told."""
        nn.Module.__init__(self)  # and not audiocraft's, which asks librosa
        self.sample_rate, self.n_chroma, self.argmax, self.norm = sample_rate, n_chroma, argmax, norm
        self.winlen = winlen or 2**radix2_exp
        self.winhop = winhop or self.winlen // 4
        self.nfft = nfft or self.winlen
        self.register_buffer("fbanks", filters(sample_rate, self.nfft, n_chroma), persistent=False)
        self.spec = torchaudio.transforms.Spectrogram(self.nfft, self.winlen, self.winhop, normalized=True)


def filters(sample_rate: int, nfft: int, classes: int) -> torch.Tensor:
    """What each frequency of a spectrum adds to each pitch class, [N, 1 + nfft // 2]; C is the first one.

    As D. Ellis' chroma has it, of which librosa's is a version: around each class a bell as wide as a class,
    or as the step from one frequency to the next where that is more; all classes of one frequency have
    the length 1, times a bell over the octaves. librosa's `filters.chroma` gives the same numbers.
    """
    frequencies_hz = np.arange(1, nfft // 2 + 2) * (sample_rate / nfft)
    pitch = classes * np.log2(frequencies_hz / LOWEST_A_HZ)  # in classes above the lowest A
    pitch = np.concatenate([pitch[:1] - 1.5 * classes, pitch])  # 0 Hz has none: far below the others
    width, pitch = np.maximum(np.diff(pitch), 1), pitch[:-1]
    half = round(classes / 2)
    away = (pitch - np.arange(classes)[:, None] + half) % classes - half  # [N, F], either way round
    bells = np.exp(-2 * (away / width) ** 2)
    bells /= np.linalg.norm(bells, axis=0)
    bells *= np.exp(-0.5 * ((pitch / classes - LOUDEST_OCTAVE) / OCTAVES_AROUND) ** 2)
    return torch.from_numpy(np.roll(bells, -3 * (classes // 12), axis=0).astype(np.float32))  # from A to C
