"""Computes the chroma (the pitch classes over time) of a signal: audiocraft's class with its own filters.

audiocraft takes its filters from librosa, which imports scipy and numba. That takes longer than loading a
melody model, and even requests without a melody need the filters, for the null melody.
"""

import math

import numpy as np
import torch
import torchaudio
from torch import nn

from musicgen_svc.audiocraft_compat import ChromaExtractor

LOWEST_A_HZ = 27.5
LOUDEST_OCTAVE, OCTAVES_AROUND = 5, 2
"""The octave with the largest weight, counted from that A, and the octaves from there to 0.61 of it."""


class Chroma(ChromaExtractor):  # type: ignore[misc]
    """Computes the chroma of a signal, [B, 1, T] at `sample_rate` -> [B, S, N], as audiocraft does."""

    def __init__(
        self, sample_rate: int, *, n_chroma: int, radix2_exp: int, nfft: int | None = None,
        winlen: int | None = None, winhop: int | None = None, argmax: bool = False, norm: float = math.inf,
    ) -> None:  # fmt: skip
        """Makes an extractor with the fields of audiocraft's configuration.

        Args:
            sample_rate: in Hz.
            n_chroma: N, the number of pitch classes.
            radix2_exp: the default of `winlen` is 2 to this power.
            nfft: samples of a Fourier transform; default: `winlen`.
            winlen: samples of a window.
            winhop: samples from window to window; default: a quarter of `winlen`.
            argmax: whether each frame is 1 in its loudest class and 0 in the others.
            norm: the order of the norm by which each frame is divided.
        """
        nn.Module.__init__(self)  # not audiocraft's, which uses librosa
        self.sample_rate, self.n_chroma, self.argmax, self.norm = sample_rate, n_chroma, argmax, norm
        self.winlen = winlen or 2**radix2_exp
        self.winhop = winhop or self.winlen // 4
        self.nfft = nfft or self.winlen
        self.register_buffer("fbanks", filters(sample_rate, self.nfft, n_chroma), persistent=False)
        self.spec = torchaudio.transforms.Spectrogram(self.nfft, self.winlen, self.winhop, normalized=True)


def filters(sample_rate: int, nfft: int, classes: int) -> torch.Tensor:
    """Returns the weight of each frequency of a spectrum in each pitch class, as librosa's `filters.chroma`.

    The formula is that of D. Ellis' `fft2chromamx`, "Chroma Feature Analysis and Synthesis" (2007): a
    Gaussian around each class, as wide as a class or as the distance of two frequencies, whichever is more;
    divided by the Euclidean norm over the classes; times a Gaussian over the octaves.

    Args:
        sample_rate: in Hz.
        nfft: samples of a Fourier transform.
        classes: N, the number of pitch classes in an octave.

    Returns:
        [N, 1 + nfft // 2] float32; the first class is C.
    """
    frequencies_hz = np.arange(1, nfft // 2 + 2) * (sample_rate / nfft)
    pitch = classes * np.log2(frequencies_hz / LOWEST_A_HZ)  # in classes above the lowest A
    pitch = np.concatenate([pitch[:1] - 1.5 * classes, pitch])  # 0 Hz has no pitch: far below the others
    width, pitch = np.maximum(np.diff(pitch), 1), pitch[:-1]
    half = round(classes / 2)
    distance = (pitch - np.arange(classes)[:, None] + half) % classes - half  # [N, F], on a circle
    bells = np.exp(-2 * (distance / width) ** 2)
    bells /= np.linalg.norm(bells, axis=0)
    bells *= np.exp(-0.5 * ((pitch / classes - LOUDEST_OCTAVE) / OCTAVES_AROUND) ** 2)
    return torch.from_numpy(np.roll(bells, -3 * (classes // 12), axis=0).astype(np.float32))  # from A to C
