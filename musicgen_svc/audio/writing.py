"""Writes samples to a wav or mp3 file with tags: a complete file, or none.

A file is made in a scratch folder beside its destination, and moved there when it is complete and checked.
The same samples and tags give the same bytes: there is no dither and no time stamp. The tags of a wav are
RIFF INFO alone, which mutagen does not read: with an ID3 chunk as well, scipy would warn.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile
import torch
from mutagen import MutagenError
from mutagen.id3 import COMM, ID3, TIT2

from musicgen_svc.audio.mp3 import FfmpegError, encode_mp3
from musicgen_svc.errors import GenerationError
from musicgen_svc.runtime.ticks import Tick, no_tick

Pcm = npt.NDArray[np.int16]

CHUNK_SAMPLES = 2**18


def write_audio(
    samples: torch.Tensor, sample_rate: int, path: Path, tags: Mapping[str, str], *, tick: Tick = no_tick
) -> None:
    """Writes samples to a .wav (16 bit) or a .mp3 (320 kbit/s CBR).

    Args:
        samples: [C, T] float32 within [-1, 1], mono or stereo, T > 0.
        sample_rate: in Hz. An mp3 is resampled if 320 kbit/s are not defined for this rate.
        path: the file, by whose suffix the format is chosen. An existing file is replaced.
        tags: `title` and `comment`, or one of them, or none.
        tick: called during the work; if it raises, nothing of the new file is left.

    Raises:
        GenerationError: the disk is full, or ffmpeg is missing or failed. Nothing of the new file is left.
    """
    assert tags.keys() <= {"title", "comment"}, tags
    write = {".wav": _write_wav, ".mp3": _write_mp3}[path.suffix]
    clean = {name: _clean(text) for name, text in tags.items() if _clean(text)}
    try:
        with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as folder:
            temporary = Path(folder) / path.name
            write(_to_int16(samples), sample_rate, temporary, clean, tick)
            temporary.replace(path)
    except (OSError, soundfile.LibsndfileError, FfmpegError, MutagenError) as exc:
        raise GenerationError(
            f"output_format is {path.suffix[1:]} but the file could not be written ({_reason(exc)}); "
            "the server's disk may be full."
        ) from exc


def _to_int16(samples: torch.Tensor) -> Pcm:
    """Rounds samples half to even: [C, T] in [-1, 1] -> [T, C].

    Only +1 itself is out of the range of 16 bits; it becomes 32767.
    """
    assert samples.dtype == torch.float32 and samples.ndim == 2
    assert samples.shape[0] in (1, 2) and samples.shape[1] > 0
    pcm = np.empty(samples.T.shape, np.int16)
    for start in range(0, len(pcm), CHUNK_SAMPLES):
        chunk = samples[:, start : start + CHUNK_SAMPLES]
        assert chunk.abs().max() <= 1, "samples must be within [-1, 1]"
        pcm[start : start + CHUNK_SAMPLES] = (chunk * 2**15).round().clamp(max=2**15 - 1).short().T.numpy()
    return pcm


def _write_wav(pcm: Pcm, sample_rate: int, path: Path, tags: Mapping[str, str], tick: Tick) -> None:
    """Writes samples [T, C] to a wav with RIFF INFO tags, and checks its length."""
    with soundfile.SoundFile(path, "w", sample_rate, pcm.shape[1], "PCM_16", format="WAV") as file:
        for name, text in tags.items():
            setattr(file, name, text)
        for start in range(0, len(pcm), CHUNK_SAMPLES):
            file.write(pcm[start : start + CHUNK_SAMPLES])
            tick(min(start + CHUNK_SAMPLES, len(pcm)), len(pcm))
    if soundfile.info(path).frames != len(pcm):
        raise OSError("it is shorter than what was written")


def _write_mp3(pcm: Pcm, sample_rate: int, path: Path, tags: Mapping[str, str], tick: Tick) -> None:
    """Writes samples [T, C] to an mp3 with ID3 tags."""
    encode_mp3(pcm, sample_rate, path, tick)
    id3 = ID3()
    if "title" in tags:
        id3.add(TIT2(text=tags["title"]))
    if "comment" in tags:
        id3.add(COMM(text=tags["comment"]))
    id3.save(path)


def _clean(text: str) -> str:
    """Removes what some tag format cannot hold: NUL, which ends a text, and unpaired surrogates."""
    return text.replace("\0", "").encode("utf-8", "replace").decode("utf-8")


def _reason(exc: Exception) -> str:
    """Returns what an error says, in a few words without the path, which a client must not read."""
    if isinstance(exc, OSError) and exc.strerror:
        return exc.strerror
    if isinstance(exc, soundfile.LibsndfileError):
        return str(exc.error_string).rstrip(".")
    if isinstance(exc, MutagenError):
        return "its tags could not be written"
    return str(exc).rstrip(".")
