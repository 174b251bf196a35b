"""Reads the selected part of an audio file: the file of `input_audio` -> samples for a model.

The file is read in one pass, about a second of audio at a time, so memory is bounded by the selected result
and not by the sample rate and channel count of the source. `decoding.py` gives the frames of the file,
`conversion.py` mixes, cuts and resamples them.
"""

from collections import deque
from fractions import Fraction
from pathlib import Path
from stat import S_ISREG

import torch

from musicgen_svc.audio.conversion import Block, Converter, frame_kind
from musicgen_svc.audio.decoding import WANTED, decode_frames, opened
from musicgen_svc.errors import AudioError
from musicgen_svc.runtime.ticks import Tick, no_tick

MAX_BYTES = 100 * 2**20
"""The size of the largest file that is accepted."""


def read_clip(
    path: Path,
    *,
    sample_rate: int,
    channels: int,
    start_s: int = 0,
    end_s: int | None = None,
    max_bytes: int = MAX_BYTES,
    max_duration_s: float = 900.0,
    tick: Tick = no_tick,
) -> torch.Tensor:
    """Reads the seconds [`start_s`, `end_s`) of a file.

    The part is cut at the source's sample rate and then resampled: n source samples become
    round(n * sample_rate / source rate) samples. The whole file is decoded in any case, because its length
    has a limit too.

    Args:
        path: the file. Its name is ignored; its content alone tells its format.
        sample_rate: of the result, in Hz.
        channels: of the result, 1 or 2.
        start_s: the first second of the part.
        end_s: the second at which the part ends; None or a value past the end of the file: its end.
        max_bytes: the largest file that is accepted.
        max_duration_s: the longest file that is accepted, whatever part of it is selected.
        tick: called with the number of bytes that were read and the size of the file.

    Returns:
        [C, T] float32 on the CPU. Full scale is 1, which float files may exceed.

    Raises:
        AudioError: the file is empty, too large, too long, not audio or undecodable, or no sample lies
            between `start_s` and `end_s`.
    """
    assert channels in (1, 2) and start_s >= 0
    size = _size(path, max_bytes)
    blocks: deque[Block] = deque()
    elapsed_s = Fraction(0)  # the length of what came before the frames of `converter`
    converter: Converter | None = None
    with opened(path) as (container, stream):
        for frame, length in decode_frames(container, stream, size, tick):
            if converter is None or converter.kind != frame_kind(frame):
                if converter is not None:
                    blocks += converter.flush()
                    elapsed_s += converter.length_s
                converter = Converter(frame, sample_rate, channels)
                converter.select(start_s - elapsed_s, None if end_s is None else end_s - elapsed_s)
            blocks += converter.feed(frame, length)
            if elapsed_s + converter.length_s > max_duration_s:
                raise AudioError(
                    f"input_audio is longer than {max_duration_s:g} s; "
                    f"it must be at most {max_duration_s:g} s ({max_duration_s / 60:g} minutes) long."
                )
    assert converter is not None  # decode_frames refuses a file without frames
    blocks += converter.flush()
    elapsed_s += converter.length_s
    samples = _joined(blocks, channels)
    if samples.shape[1] == 0:
        end = "" if end_s is None or end_s > start_s else f", continuation_end is {end_s} s"
        raise AudioError(
            f"continuation_start is {start_s} s{end} and input_audio is {float(elapsed_s):.2f} s long; "
            "the start must come before the end (-1 stands for the end of the clip)."
        )
    tick(size, size)
    return samples


def _size(path: Path, max_bytes: int) -> int:
    """Returns the size of the file in bytes.

    Raises:
        AudioError: it is no regular file, or it is empty or too large.
    """
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


def _joined(blocks: deque[Block], channels: int) -> torch.Tensor:
    """Joins blocks [n, C] to [C, T], and frees each block once it is copied."""
    samples = torch.empty(channels, sum(map(len, blocks)))
    position = 0
    while blocks:
        block = torch.from_numpy(blocks.popleft())
        samples[:, position : position + len(block)] = block.T
        position += len(block)
    return samples
