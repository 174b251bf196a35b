"""Any file -> samples: what `input_audio` holds, checked, cut, and brought to a model's rate and channels.

The file is read in one pass, about a second of sound at a time, so that memory is bounded by the
selected result and never by the source's own rate and channel count.

- Formats are told by content alone: FFmpeg is given the bytes without a name. It may open nothing but
  these bytes and only as one of `CONTAINERS`, so a playlist cannot lead it to other files or the network.
- Of several tracks FFmpeg's own choice is used: the one that is marked as the default, else the one with the
  highest bit rate, else the first.
- More than two channels are mixed down to stereo by FFmpeg's standard matrix (its coefficients add up to
  at most 1, whatever the sample format); mono is the mean of the channels, stereo from mono is both alike.
- Encoder delay and padding are taken off where the file states them (mp3, m4a, ogg, webm).
- A file that breaks off, or whose header promises more than there is, gives what is there, as in a
  player; damaged packets are passed over, unless they are the majority.
- Samples that are not finite, or more than 30 dB above full scale, are refused: they would turn a whole
  request into noise, and no replacement for them would be what the sender meant.
"""

import errno
import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from stat import S_ISREG
from typing import BinaryIO

import av
import numpy as np
import numpy.typing as npt
import soxr
import torch
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.packet import Packet

from musicgen_svc.audio.formats import CONTAINERS, DECODERS, HEAD_BYTES, not_audio
from musicgen_svc.errors import AudioError
from musicgen_svc.runtime.ticks import Tick, no_tick

Block = npt.NDArray[np.float32]

WANTED = "it must be an audio file such as wav, mp3, flac, ogg, opus, m4a or webm"
SOURCE_RATES_HZ = range(4_000, 384_001)
MAX_LEVEL = 32.0  # 30 dB above full scale
BLOCK_S = 1  # what the resampler is fed at a time
TICK_S = 0.1


@dataclass(frozen=True, eq=False)
class Clip:
    """The selected part of a file."""

    samples: torch.Tensor  # [C, T] float32; full scale is 1, which float files may exceed
    sample_rate: int
    source_duration_s: float  # of the whole file


def read_clip(
    path: Path,
    *,
    sample_rate: int,
    channels: int,
    start_s: int = 0,
    end_s: int | None = None,
    max_bytes: int = 100 * 2**20,
    max_duration_s: float = 900.0,
    tick: Tick = no_tick,
) -> Clip:
    """Reads seconds [`start_s`, `end_s`) of a file, mono or stereo, at `sample_rate`.

    The part is cut at the source's rate and then resampled: n source samples become
    round(n * sample_rate / source rate). An `end_s` past the file's end means the end. The whole file
    is decoded in any case: its length is a limit and part of the result. `tick` counts bytes.

    Raises AudioError: empty, too large, too long, not audio, undecodable, or nothing between the two.
    """
    assert channels in (1, 2) and start_s >= 0
    size = _size(path, max_bytes)
    blocks: deque[Block] = deque()
    elapsed_s = Fraction(0)  # up to where `run` begins
    run: _Run | None = None
    with _opened(path) as (container, stream):
        for frame, length in _frames(container, stream, size, tick):
            if run is None or run.key != _key(frame):
                if run is not None:
                    blocks += run.flush()
                    elapsed_s += run.length_s
                run = _Run(frame, sample_rate, channels)
                run.select(start_s - elapsed_s, None if end_s is None else end_s - elapsed_s)
            blocks += run.feed(frame, length)
            if elapsed_s + run.length_s > max_duration_s:
                raise AudioError(
                    f"input_audio is longer than {max_duration_s:g} s; "
                    f"it must be at most {max_duration_s:g} s ({max_duration_s / 60:g} minutes) long."
                )
    assert run is not None  # _frames refuses a file without any
    blocks += run.flush()
    elapsed_s += run.length_s
    samples = _joined(blocks, channels)
    if samples.shape[1] == 0:
        end = "" if end_s is None or end_s > start_s else f", continuation_end is {end_s} s"
        raise AudioError(
            f"continuation_start is {start_s} s{end} and input_audio is {float(elapsed_s):.2f} s long; "
            "the start must come before the end (-1 stands for the end of the clip)."
        )
    tick(size, size)
    return Clip(samples, sample_rate, float(elapsed_s))


def _size(path: Path, max_bytes: int) -> int:
    try:
        status = path.stat()
    except OSError as exc:
        raise AudioError(f"input_audio cannot be opened ({exc.strerror}); {WANTED}.") from exc
    if not S_ISREG(status.st_mode):
        raise AudioError(f"input_audio is not a regular file; {WANTED}.")
    if status.st_size == 0:
        raise AudioError(f"input_audio is empty (0 bytes); {WANTED}.")
    if status.st_size > max_bytes:
        raise AudioError(
            f"input_audio is {status.st_size:,} bytes; "
            f"it must be at most {max_bytes:,} bytes ({max_bytes / 2**20:g} MB)."
        )
    return status.st_size


class _Source:
    """The bytes of a file for FFmpeg, without the file's name: no suffix to take for the format."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.read = file.read
        self.tell = file.tell

    def seek(self, offset: int, whence: int) -> int:
        """Negative where no file can go: a damaged header may point anywhere."""
        try:
            return self._file.seek(offset, whence)
        except (OSError, ValueError):
            return -errno.EINVAL


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, AudioStream]]:
    """The container and its best stream of sound."""
    options = {"format_whitelist": CONTAINERS, "codec_whitelist": DECODERS, "protocol_whitelist": "none"}
    with path.open("rb") as file:
        if found := not_audio(file.read(HEAD_BYTES)):
            raise AudioError(f"input_audio is {found}; {WANTED}.")
        file.seek(0)
        try:
            container = av.open(_Source(file), "r", options=options, metadata_errors="replace")
        except av.FFmpegError as exc:  # MemoryError among them: headers may ask for any amount
            raise AudioError(f"input_audio is not audio that can be read; {WANTED}.") from exc
        with container:
            stream = container.streams.best("audio")
            if stream is None:
                raise AudioError(f"input_audio ({container.format.name}) has no sound in it; {WANTED}.")
            assert isinstance(stream, AudioStream)
            codec = stream.codec_context.codec.name if stream.codec_context else "something unknown"
            if codec not in DECODERS.split(","):
                raise AudioError(f"input_audio is coded as {codec}; {WANTED}.")
            yield container, stream


def _frames(
    container: InputContainer, stream: AudioStream, size: int, tick: Tick
) -> Iterator[tuple[AudioFrame, int]]:
    """Every frame that decodes and how many of its samples count, up to where the file can be read."""
    good = bad = position = 0
    held: tuple[AudioFrame, int] | None = None
    ticked_s = time.monotonic()
    for packet in _packets(container, stream):
        if time.monotonic() > ticked_s + TICK_S:
            ticked_s = time.monotonic()
            position = max(position, min(packet.pos or 0, size))
            tick(position, size)
        try:
            frames = [frame for frame in stream.decode(packet) if frame.samples]
        except av.FFmpegError:
            bad += 1
            continue
        for frame in frames:
            good += 1
            if held is not None:
                yield held[0], held[0].samples
            held = frame, _stated_length(packet, frame)
    if bad > good:
        raise AudioError(f"input_audio is damaged ({bad} of {bad + good} packets do not decode); {WANTED}.")
    if held is None:
        raise AudioError(f"input_audio holds no samples; {WANTED}, with sound in it.")
    yield held


def _packets(container: InputContainer, stream: AudioStream) -> Iterator["Packet[AudioStream]"]:
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except av.FFmpegError:
            return
        except IndexError:  # PyAV's, at a packet of a stream that begins only now: it is not ours, so go on
            packets = container.demux(stream)
            continue
        if packet is None:
            return
        yield packet


def _stated_length(packet: "Packet[AudioStream]", frame: AudioFrame) -> int:
    """Samples of a frame by its packet. In m4a this alone says how much of the last one is padding."""
    if not packet.duration or packet.time_base > Fraction(2, frame.sample_rate):  # HE-AAC counts in twos
        return frame.samples
    return min(frame.samples, round(packet.duration * packet.time_base * frame.sample_rate))


def _key(frame: AudioFrame) -> tuple[int, str, str]:
    return frame.sample_rate, frame.layout.name, frame.format.name


class _Run:
    """Consecutive frames of one rate, layout and format: mixed, cut and resampled to [n, C] blocks.

    Nearly every file is one run. Joined-up mp3s and chained ogg streams change on the way.
    """

    def __init__(self, frame: AudioFrame, sample_rate: int, channels: int) -> None:
        self.key = _key(frame)
        self.rate = frame.sample_rate
        if self.rate not in SOURCE_RATES_HZ:
            low, high = SOURCE_RATES_HZ[0], SOURCE_RATES_HZ[-1]
            raise AudioError(
                f"input_audio has a sample rate of {self.rate} Hz; it must be between {low} and {high} Hz."
            )
        self.channels = channels
        self.count = 0  # samples seen
        self.pending: list[Block] = []
        self.pending_count = 0
        stereo = "stereo" if frame.layout.nb_channels > 2 else None
        self.to_float = AudioResampler("fltp", stereo, options={"rematrix_maxval": "1"})
        self.to_rate: soxr.ResampleStream | None = None
        if sample_rate != self.rate:
            self.to_rate = soxr.ResampleStream(self.rate, sample_rate, channels, quality="HQ")

    def select(self, start_s: Fraction, end_s: Fraction | None) -> None:
        """The part to keep, counted from the run's first sample; it may lie before or behind the run."""
        self.start = max(0, math.ceil(start_s * self.rate))
        self.end = None if end_s is None else math.ceil(end_s * self.rate)

    @property
    def length_s(self) -> Fraction:
        return Fraction(self.count, self.rate)

    def feed(self, frame: AudioFrame, length: int) -> Iterator[Block]:
        """The first `length` samples of a frame."""
        start = max(0, self.start - self.count)
        end = length if self.end is None else min(length, self.end - self.count)
        self.count += length
        if start >= end:
            return
        block = self._mix(self._floats(frame)[:, start:end])
        self.pending.append(block)
        self.pending_count += len(block)
        if self.pending_count >= BLOCK_S * self.rate:
            yield self._resample(last=False)

    def flush(self) -> Iterator[Block]:
        """What is left, once no more frames will come."""
        yield self._resample(last=True)

    def _floats(self, frame: AudioFrame) -> Block:
        """[1 or 2, n], full scale at 1."""
        try:
            converted = self.to_float.resample(frame)
        except (av.FFmpegError, ValueError) as exc:
            raise AudioError(
                f"input_audio has {frame.layout.nb_channels} channels in an order that cannot be mixed "
                f"({frame.layout.name}); it must be mono, stereo or a common surround format such as 5.1."
            ) from exc
        floats: Block = np.concatenate([part.to_ndarray() for part in converted], axis=1, dtype=np.float32)
        assert floats.shape[1] == frame.samples, "frames must keep their length for the cut to be exact"
        return floats

    def _mix(self, planar: Block) -> Block:
        """[1 or 2, n] -> [n, C]"""
        level = float(np.abs(planar).max())
        if not level <= MAX_LEVEL:  # also refuses NaN
            what = f"samples of {level:g}" if math.isfinite(level) else "samples that are NaN or infinite"
            raise AudioError(f"input_audio has {what}; they must be finite, with full scale at 1.")
        if len(planar) > self.channels:
            planar = planar.mean(axis=0, keepdims=True)
        return np.ascontiguousarray(np.broadcast_to(planar, (self.channels, planar.shape[1])).T)

    def _resample(self, *, last: bool) -> Block:
        block = np.concatenate([np.zeros((0, self.channels), np.float32), *self.pending])
        self.pending, self.pending_count = [], 0
        return block if self.to_rate is None else self.to_rate.resample_chunk(block, last)


def _joined(blocks: deque[Block], channels: int) -> torch.Tensor:
    """[n, C] blocks -> [C, T]; each block is let go as it is copied."""
    samples = torch.empty(channels, sum(map(len, blocks)))
    position = 0
    while blocks:
        block = torch.from_numpy(blocks.popleft())
        samples[:, position : position + len(block)] = block.T
        position += len(block)
    return samples
