"""Encodes mp3 with pydub, which runs ffmpeg, and keeps pydub's faults from the rest of the service.

This is the only module that knows pydub. What it guards against:

- pydub looks for ffmpeg on import, and warns. Here it is told which ffmpeg to run: the system's, else the one
  that imageio-ffmpeg brings, which is imported only then.
- pydub leaves its temporary files behind, open, when an encoding fails. So its `NamedTemporaryFile` is
  replaced when the first mp3 is encoded; from then on the files of an encoding are in its own scratch
  folder and are closed at its end.
- pydub gives no access to the ffmpeg process. To stop it early, its input is truncated.
"""

import os
import shutil
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from musicgen_svc.errors import GenerationError
from musicgen_svc.runtime.ticks import CHECK_S, Tick

with warnings.catch_warnings():
    # pydub looks for ffmpeg, uses a module that Python 3.13 drops (the service runs on 3.12), and was written
    # before Python warned about invalid escapes.
    warnings.filterwarnings("ignore", "Couldn't find ff", RuntimeWarning)
    warnings.filterwarnings("ignore", "'audioop' is deprecated", DeprecationWarning)
    warnings.filterwarnings("ignore", "invalid escape sequence")
    import pydub.audio_segment
    from pydub import AudioSegment
    from pydub.exceptions import CouldntEncodeError

BITRATE_KBPS = 320
RATES_HZ = (32_000, 44_100, 48_000)  # those of MPEG-1, the only ones with 320 kbit/s
WAV_HEADER_BYTES = 44


class FfmpegError(Exception):
    """ffmpeg failed; the message is a few words for a sentence."""


def encode_mp3(pcm: npt.NDArray[np.int16], sample_rate: int, path: Path, tick: Tick) -> None:
    """Encodes samples to a 320 kbit/s CBR mp3 without tags.

    ffmpeg resamples samples whose rate has no 320 kbit/s.

    Args:
        pcm: [T, C], mono or stereo.
        sample_rate: in Hz.
        path: the new file, in a scratch folder that belongs to this encoding: if `tick` raises, every file in
            that folder is truncated.
        tick: called every 0.1 s without progress; may raise to end the encoding.

    Raises:
        FfmpegError: ffmpeg failed.
        GenerationError: there is no ffmpeg.
        OSError: a file could not be written, or the result is incomplete.
    """
    segment = AudioSegment(pcm.tobytes(), sample_width=2, frame_rate=sample_rate, channels=pcm.shape[1])
    segment.converter = _find_ffmpeg()
    with ThreadPoolExecutor(1, "mp3") as pool:
        job = pool.submit(_export, segment, path)
        try:
            while not wait([job], CHECK_S).done:
                tick(0, 1)
        except BaseException:
            while not wait([job], CHECK_S / 10).done:
                _truncate_files(path.parent)
            raise
        job.result()
    if path.stat().st_size < len(pcm) / sample_rate * BITRATE_KBPS * 1000 / 8:
        raise OSError("it is shorter than what was written")


def _export(segment: AudioSegment, path: Path) -> None:
    """Runs pydub's export with its temporary files in the folder of `path`."""
    pydub.audio_segment.NamedTemporaryFile = _temporary_file
    with ExitStack() as opened, path.open("wb+") as file:
        _scratch.set(_Scratch(path.parent, opened, WAV_HEADER_BYTES + len(segment.raw_data)))
        try:
            rate = ["-ar", str(_rate_hz(segment.frame_rate))]
            segment.export(file, format="mp3", bitrate=f"{BITRATE_KBPS}k", parameters=rate)
        except CouldntEncodeError as exc:
            full = "No space left" in str(exc)
            raise FfmpegError("No space left on device" if full else "ffmpeg failed") from exc
        except (FileNotFoundError, PermissionError) as exc:
            if exc.filename != segment.converter:
                raise
            raise _no_ffmpeg(segment.converter) from exc


def _rate_hz(sample_rate: int) -> int:
    """Returns the sample rate of the mp3: the given rate, else the first multiple of it, else the highest."""
    return next((rate for rate in RATES_HZ if rate % sample_rate == 0), RATES_HZ[-1])


def _truncate_files(folder: Path) -> None:
    """Ends an encoding early: ffmpeg stops where its input ends."""
    for file in folder.iterdir():
        with suppress(FileNotFoundError):  # pydub may be deleting its files
            os.truncate(file, 0)


@dataclass(frozen=True)
class _Scratch:
    """The folder of the temporary files of one encoding, and what closes them."""

    folder: Path
    opened: ExitStack
    wav_bytes: int
    """The size of the wav that pydub writes for ffmpeg."""


_scratch: ContextVar[_Scratch | None] = ContextVar("scratch", default=None)


def _temporary_file(mode: str, **options: Any) -> Any:
    """Replaces pydub's `NamedTemporaryFile`.

    Files of an encoding in this module go to its scratch folder. Files of any other user of pydub go where
    they always went.
    """
    make: Any = tempfile.NamedTemporaryFile
    scratch = _scratch.get()
    if scratch is None:
        return make(mode, **options)
    file = scratch.opened.enter_context(make(mode, dir=scratch.folder, **options))
    if mode == "wb" and hasattr(os, "posix_fallocate"):
        # This is the wav for ffmpeg. On a full disk this call fails, before pydub has started a process that
        # it would not clean up.
        os.posix_fallocate(file.fileno(), 0, scratch.wav_bytes)
    return file


def _find_ffmpeg() -> str:
    """Returns the path of the system's ffmpeg, else of the one that imageio-ffmpeg brings."""
    if own := shutil.which("ffmpeg"):
        return own
    try:
        from imageio_ffmpeg import get_ffmpeg_exe

        return str(get_ffmpeg_exe())
    except (ImportError, RuntimeError) as exc:
        raise _no_ffmpeg("ffmpeg") from exc


def _no_ffmpeg(name: str) -> GenerationError:
    """Returns the error for a missing ffmpeg with this name or path."""
    return GenerationError(
        f"output_format is mp3 but ffmpeg was not found on the server ({Path(name).name}); "
        "install it, or ask for wav."
    )
