"""Decodes a file with FFmpeg: bytes of unknown origin -> the frames of one audio stream.

- FFmpeg tells the format by the content alone, because it gets the bytes without a name. It may open nothing
  but these bytes, and only as one of `CONTAINERS`, so a playlist cannot make it open other files or URLs.
- Of several streams FFmpeg's own choice is used: the default stream, else the one with the highest bit rate,
  else the first.
- Encoder delay and padding are removed where the file states them (mp3, m4a, ogg, webm).
- A truncated file, or one whose header promises more frames than there are, gives the frames that it has, as
  in a player.
  Damaged packets are skipped, unless they are the majority.
"""

import errno
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.packet import Packet

from musicgen_svc.audio.formats import CONTAINERS, DECODERS, HEAD_BYTES, not_audio
from musicgen_svc.errors import AudioError
from musicgen_svc.runtime.ticks import Tick

WANTED = "it must be an audio file such as wav, mp3, flac, ogg, opus, m4a or webm"
"""What every refusal of a file asks for."""
TICK_S = 0.1


class _Source:
    """The bytes of a file for FFmpeg, without its name, whose suffix FFmpeg would take for the format."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.read = file.read
        self.tell = file.tell

    def seek(self, offset: int, whence: int) -> int:
        """Moves to an offset, as `io` defines it; returns the position, or a negative errno.

        A damaged header may name any offset, also one that no file has.
        """
        try:
            return self._file.seek(offset, whence)
        except (OSError, ValueError):
            return -errno.EINVAL


@contextmanager
def opened(path: Path) -> Iterator[tuple[InputContainer, AudioStream]]:
    """Opens a file and yields its container and its best audio stream.

    Raises:
        AudioError: the file is not audio, has no audio stream, or is coded in a way that is not supported.
    """
    options = {"format_whitelist": CONTAINERS, "codec_whitelist": DECODERS, "protocol_whitelist": "none"}
    with path.open("rb") as file:
        if found := not_audio(file.read(HEAD_BYTES)):
            raise AudioError(f"input_audio is {found}; {WANTED}.")
        file.seek(0)
        try:
            container = av.open(_Source(file), "r", options=options, metadata_errors="replace")
        except av.FFmpegError as exc:  # also a MemoryError, since a header may ask for any amount of memory
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


def decode_frames(
    container: InputContainer, stream: AudioStream, size: int, tick: Tick
) -> Iterator[tuple[AudioFrame, int]]:
    """Decodes a stream up to where the file can be read.

    Args:
        container: what `opened` gave.
        stream: what `opened` gave.
        size: of the file in bytes.
        tick: called with the position in the file and its size.

    Yields:
        Each frame, and how many of its samples are sound and not padding.

    Raises:
        AudioError: most packets are damaged, or there is no frame.
    """
    good = bad = position = 0
    held: tuple[AudioFrame, int] | None = None  # the latest frame; only the last one may end in padding
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
    """Yields the packets of a stream until the file ends or cannot be read any further."""
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except av.FFmpegError:
            return
        except IndexError:  # PyAV raises it at the first packet of a stream that begins late: skip the packet
            packets = container.demux(stream)
            continue
        if packet is None:
            return
        yield packet


def _stated_length(packet: "Packet[AudioStream]", frame: AudioFrame) -> int:
    """Returns the samples of a frame that count, by the duration of its packet.

    In m4a nothing else says how much of the last frame is padding.
    """
    if not packet.duration or packet.time_base > Fraction(2, frame.sample_rate):  # HE-AAC counts in twos
        return frame.samples
    return min(frame.samples, round(packet.duration * packet.time_base * frame.sample_rate))
