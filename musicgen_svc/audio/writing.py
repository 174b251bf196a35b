"""Samples -> wav or mp3 with tags: a whole file or none.

A file is made in a scratch folder beside its destination and moved there when it is complete and
checked. The same samples and tags give the same bytes: no dither, no time stamp. A wav's tags are RIFF
INFO, which mutagen does not read; an ID3 chunk as well would make scipy warn of it.

mp3 goes through pydub, which runs ffmpeg: the system's, else the one that imageio-ffmpeg brings.
"""

import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import numpy.typing as npt
import soundfile
import torch
from mutagen import MutagenError
from mutagen.id3 import COMM, ID3, TIT2

from musicgen_svc.errors import GenerationError
from musicgen_svc.runtime.ticks import Tick, no_tick

with warnings.catch_warnings():
    # pydub looks for ffmpeg when it is imported (we name ours), uses a module that Python 3.13 drops
    # (we stop at 3.12), and was written before invalid escapes were warned about.
    warnings.filterwarnings("ignore", "Couldn't find ff", RuntimeWarning)
    warnings.filterwarnings("ignore", "'audioop' is deprecated", DeprecationWarning)
    warnings.filterwarnings("ignore", "invalid escape sequence")
    import pydub.audio_segment
    from pydub import AudioSegment
    from pydub.exceptions import CouldntEncodeError

Pcm = npt.NDArray[np.int16]

MP3_BITRATE_KBPS = 320
MP3_RATES_HZ = (32_000, 44_100, 48_000)  # those of MPEG-1, the only ones with 320 kbit/s
WAV_HEADER_BYTES = 44
CHUNK = 2**18
POLL_S = 0.1


def write_audio(
    samples: torch.Tensor, sample_rate: int, path: Path, tags: Mapping[str, str], *, tick: Tick = no_tick
) -> None:
    """Writes samples [C, T] float32 in [-1, 1], mono or stereo, to a .wav (16 bit) or .mp3 (320 kbit/s CBR).

    ffmpeg resamples for an mp3 what is at a rate that 320 kbit/s are not defined for.

    `tags` may hold `title` and `comment`. An existing file is replaced. When this raises, be it out of
    `tick`, nothing of the new file is left.

    Raises GenerationError: the disk is full, or ffmpeg is missing or failed.
    """
    assert tags.keys() <= {"title", "comment"}, tags
    write = {".wav": _write_wav, ".mp3": _write_mp3}[path.suffix]
    clean = {name: _clean(text) for name, text in tags.items() if _clean(text)}
    try:
        with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as folder:
            draft = Path(folder) / path.name
            write(_to_int16(samples), sample_rate, draft, clean, tick)
            draft.replace(path)
    except (OSError, soundfile.LibsndfileError, CouldntEncodeError, MutagenError) as exc:
        raise GenerationError(
            f"output_format is {path.suffix[1:]} but the file could not be written ({_reason(exc)}); "
            "the server's disk may be full."
        ) from exc


def _to_int16(samples: torch.Tensor) -> Pcm:
    """[C, T] in [-1, 1] -> [T, C], rounded half to even; only +1 itself does not fit, and becomes 32767."""
    assert samples.dtype == torch.float32 and samples.ndim == 2
    assert samples.shape[0] in (1, 2) and samples.shape[1] > 0
    pcm = np.empty(samples.T.shape, np.int16)
    for start in range(0, len(pcm), CHUNK):
        chunk = samples[:, start : start + CHUNK]
        assert chunk.abs().max() <= 1, "samples must be within [-1, 1]"
        pcm[start : start + CHUNK] = (chunk * 2**15).round().clamp(max=2**15 - 1).short().T.numpy()
    return pcm


def _write_wav(pcm: Pcm, sample_rate: int, draft: Path, tags: Mapping[str, str], tick: Tick) -> None:
    with soundfile.SoundFile(draft, "w", sample_rate, pcm.shape[1], "PCM_16", format="WAV") as file:
        for name, text in tags.items():
            setattr(file, name, text)
        for start in range(0, len(pcm), CHUNK):
            file.write(pcm[start : start + CHUNK])
            tick(min(start + CHUNK, len(pcm)), len(pcm))
    if soundfile.info(draft).frames != len(pcm):
        raise OSError("it is shorter than what was written")


def _write_mp3(pcm: Pcm, sample_rate: int, draft: Path, tags: Mapping[str, str], tick: Tick) -> None:
    segment = AudioSegment(pcm.tobytes(), sample_width=2, frame_rate=sample_rate, channels=pcm.shape[1])
    segment.converter = _ffmpeg()
    with ThreadPoolExecutor(1, "mp3") as pool:
        job = pool.submit(_encode, segment, draft)
        try:
            while not wait([job], POLL_S).done:
                tick(0, 1)
        except BaseException:
            while not wait([job], POLL_S / 10).done:
                _cut_short(draft.parent)
            raise
        job.result()
    if draft.stat().st_size < len(pcm) / sample_rate * MP3_BITRATE_KBPS * 1000 / 8:
        raise OSError("it is shorter than what was written")
    id3 = ID3()
    if "title" in tags:
        id3.add(TIT2(text=tags["title"]))
    if "comment" in tags:
        id3.add(COMM(text=tags["comment"]))
    id3.save(draft)


def _encode(segment: AudioSegment, draft: Path) -> None:
    """pydub's export, whose own temporary files stay in the scratch folder."""
    with ExitStack() as opened, draft.open("wb+") as file:
        _scratch.set(_Scratch(draft.parent, opened, WAV_HEADER_BYTES + len(segment.raw_data)))
        try:
            rate = ["-ar", str(_mp3_rate_hz(segment.frame_rate))]
            segment.export(file, format="mp3", bitrate=f"{MP3_BITRATE_KBPS}k", parameters=rate)
        except (FileNotFoundError, PermissionError) as exc:
            if exc.filename != segment.converter:
                raise
            raise _no_ffmpeg(segment.converter) from exc


def _mp3_rate_hz(sample_rate: int) -> int:
    """The rate itself, the first multiple of it, or the highest."""
    return next((rate for rate in MP3_RATES_HZ if rate % sample_rate == 0), MP3_RATES_HZ[-1])


def _cut_short(folder: Path) -> None:
    """Ends an encoding early: pydub's ffmpeg cannot be reached, but it stops where its input does."""
    for file in folder.iterdir():
        with suppress(FileNotFoundError):  # pydub may be tidying up
            os.truncate(file, 0)


@dataclass(frozen=True)
class _Scratch:
    """Where pydub's temporary files go during one encoding, and who closes them."""

    folder: Path
    opened: ExitStack
    wav_bytes: int


_scratch: ContextVar[_Scratch | None] = ContextVar("scratch", default=None)


def _temporary_file(mode: str, **options: Any) -> Any:
    """In place of pydub's `NamedTemporaryFile`: when an encoding fails, pydub leaves its files where they
    are, open. Ours go where they are closed and removed; anybody else's go where they always went.
    """
    make: Any = tempfile.NamedTemporaryFile
    scratch = _scratch.get()
    if scratch is None:
        return make(mode, **options)
    file = scratch.opened.enter_context(make(mode, dir=scratch.folder, **options))
    if mode == "wb" and hasattr(os, "posix_fallocate"):
        # The wav for ffmpeg. On a full disk this fails before pydub has begun what it cannot clear up.
        os.posix_fallocate(file.fileno(), 0, scratch.wav_bytes)
    return file


pydub.audio_segment.NamedTemporaryFile = _temporary_file


def _ffmpeg() -> str:
    try:
        return shutil.which("ffmpeg") or imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as exc:
        raise _no_ffmpeg("ffmpeg") from exc


def _no_ffmpeg(name: str) -> GenerationError:
    return GenerationError(
        f"output_format is mp3 but ffmpeg was not found on the server ({Path(name).name}); "
        "install it, or ask for wav."
    )


def _clean(text: str) -> str:
    """What every tag format can hold: no NUL, which ends a text, and no half of a character."""
    return text.replace("\0", "").encode("utf-8", "replace").decode("utf-8")


def _reason(exc: Exception) -> str:
    if isinstance(exc, CouldntEncodeError):
        return "No space left on device" if "No space left" in str(exc) else "ffmpeg failed"
    if isinstance(exc, OSError) and exc.strerror:
        return exc.strerror
    if isinstance(exc, soundfile.LibsndfileError):
        return str(exc.error_string).rstrip(".")  # without the file's path, which is no client's business
    if isinstance(exc, MutagenError):
        return "its tags could not be written"
    return str(exc).rstrip(".")
