"""Mixes, cuts and resamples decoded frames: any channels and sample rate -> those of a model.

- More than two channels are mixed down to stereo by FFmpeg's standard matrix, whose coefficients add up to
  at most 1, whatever the sample format. Mono is the mean of two channels. Stereo from mono has two equal
  channels.
- Samples that are not finite, or more than 30 dB above full scale, are refused: they would turn a whole
  request into noise, and no replacement for them would be what the sender meant.
"""

import math
from collections.abc import Iterator
from fractions import Fraction

import av
import numpy as np
import numpy.typing as npt
import soxr
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler

from musicgen_svc.errors import AudioError

Block = npt.NDArray[np.float32]

SOURCE_RATES_HZ = range(4_000, 384_001)
MAX_LEVEL = 32.0  # 30 dB above full scale
BLOCK_S = 1  # what the resampler gets at a time


def frame_kind(frame: AudioFrame) -> tuple[int, str, str]:
    """Returns what all frames of one `Converter` share: sample rate, channel layout and sample format."""
    return frame.sample_rate, frame.layout.name, frame.format.name


class Converter:
    """Converts consecutive frames of one kind to blocks [n, C] at the wanted rate.

    Nearly every file needs one converter. Concatenated mp3s and chained ogg streams, whose kind of frame
    changes, need several.
    """

    def __init__(self, frame: AudioFrame, sample_rate: int, channels: int) -> None:
        """Prepares the conversion; `select` must be called before the first frame is fed.

        Args:
            frame: the first of the frames.
            sample_rate: of the result, in Hz.
            channels: of the result, 1 or 2.

        Raises:
            AudioError: the frame's sample rate is outside `SOURCE_RATES_HZ`.
        """
        self.kind = frame_kind(frame)
        self._rate = frame.sample_rate
        if self._rate not in SOURCE_RATES_HZ:
            low, high = SOURCE_RATES_HZ[0], SOURCE_RATES_HZ[-1]
            raise AudioError(
                f"input_audio has a sample rate of {self._rate} Hz; it must be between {low} and {high} Hz."
            )
        self._channels = channels
        self._count = 0  # samples fed so far, selected or not
        self._pending: list[Block] = []
        self._pending_count = 0  # samples in the pending blocks
        stereo = "stereo" if frame.layout.nb_channels > 2 else None
        self._to_float = AudioResampler("fltp", stereo, options={"rematrix_maxval": "1"})
        self._to_rate: soxr.ResampleStream | None = None
        if sample_rate != self._rate:
            self._to_rate = soxr.ResampleStream(self._rate, sample_rate, channels, quality="HQ")

    def select(self, start_s: Fraction, end_s: Fraction | None) -> None:
        """Sets the part to keep, in seconds from the first frame; it may lie before it or after the last."""
        self._start = max(0, math.ceil(start_s * self._rate))
        self._end = None if end_s is None else math.ceil(end_s * self._rate)

    @property
    def length_s(self) -> Fraction:
        """The length of all frames fed so far, in seconds."""
        return Fraction(self._count, self._rate)

    def feed(self, frame: AudioFrame, length: int) -> Iterator[Block]:
        """Takes the first `length` samples of a frame and yields the blocks that are complete.

        Raises:
            AudioError: the channels cannot be mixed, or a sample is not finite or far above full scale.
        """
        start = max(0, self._start - self._count)
        end = length if self._end is None else min(length, self._end - self._count)
        self._count += length
        if start >= end:
            return
        block = self._mix(self._floats(frame)[:, start:end])
        self._pending.append(block)
        self._pending_count += len(block)
        if self._pending_count >= BLOCK_S * self._rate:
            yield self._resample(last=False)

    def flush(self) -> Iterator[Block]:
        """Yields the rest, once no more frames will come."""
        yield self._resample(last=True)

    def _floats(self, frame: AudioFrame) -> Block:
        """Converts a frame to [1 or 2, n] float32 with full scale at 1."""
        try:
            converted = self._to_float.resample(frame)
        except (av.FFmpegError, ValueError) as exc:
            raise AudioError(
                f"input_audio has {frame.layout.nb_channels} channels in an order that cannot be mixed "
                f"({frame.layout.name}); it must be mono, stereo or a common surround format such as 5.1."
            ) from exc
        floats: Block = np.concatenate([part.to_ndarray() for part in converted], axis=1, dtype=np.float32)
        assert floats.shape[1] == frame.samples, "frames must keep their length for the cut to be exact"
        return floats

    def _mix(self, planar: Block) -> Block:
        """Checks the level and mixes the channels: [1 or 2, n] -> [n, C]."""
        level = float(np.abs(planar).max())
        if not level <= MAX_LEVEL:  # also refuses NaN
            what = f"samples of {level:g}" if math.isfinite(level) else "samples that are NaN or infinite"
            raise AudioError(f"input_audio has {what}; they must be finite, with full scale at 1.")
        if len(planar) > self._channels:
            planar = planar.mean(axis=0, keepdims=True)
        return np.ascontiguousarray(np.broadcast_to(planar, (self._channels, planar.shape[1])).T)

    def _resample(self, *, last: bool) -> Block:
        """Resamples the pending blocks; `last`: no more will come, so the filter's tail is written too."""
        block = np.concatenate([np.zeros((0, self._channels), np.float32), *self._pending])
        self._pending, self._pending_count = [], 0
        return block if self._to_rate is None else self._to_rate.resample_chunk(block, last)
