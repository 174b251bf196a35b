"""Makes audio files for tests: tones and noise in many formats, and functions that measure them.

Samples are float32 [C, T] with full scale at 1.
"""

import io
import struct
import subprocess
import zlib
from fractions import Fraction
from pathlib import Path

import av
import imageio_ffmpeg
import mutagen.id3
import numpy as np
import numpy.typing as npt
import soundfile

Samples = npt.NDArray[np.float32]

# name: (container, encoder) as PyAV knows them
ENCODERS = {
    "mp3": ("mp3", "libmp3lame"),
    "mp2": ("mp2", "mp2"),
    "flac": ("flac", "flac"),
    "opus": ("ogg", "libopus"),
    "webm": ("webm", "libopus"),
    "m4a": ("mp4", "aac"),
    "aac": ("adts", "aac"),
    "latm": ("latm", "aac"),
    "alac": ("ipod", "alac"),
    "caf": ("caf", "pcm_s24be"),
    "caf-alac": ("caf", "alac"),
    "aiff": ("aiff", "pcm_s16be"),
    "au": ("au", "pcm_s16be"),
    "mp3-mkv": ("matroska", "libmp3lame"),
    "mp3-avi": ("avi", "libmp3lame"),
    "aac-flv": ("flv", "aac"),
    "aac-ts": ("mpegts", "aac"),
    "ac3-ts": ("mpegts", "ac3"),
    "mp2-mpeg": ("mpeg", "mp2"),
    "wma": ("asf", "wmav2"),
    "ac3": ("ac3", "ac3"),
    "eac3": ("eac3", "eac3"),
    "wavpack": ("wv", "wavpack"),
    "tta": ("tta", "tta"),
    "ogg-flac": ("ogg", "flac"),
    "wav8": ("wav", "pcm_u8"),
    "wav16": ("wav", "pcm_s16le"),
    "wav24": ("wav", "pcm_s24le"),
    "wav32": ("wav", "pcm_s32le"),
    "wavf32": ("wav", "pcm_f32le"),
    "wavf64": ("wav", "pcm_f64le"),
}
KINDS = (*ENCODERS, "ogg")
# Formats for speech, and formats with few bits per sample.
ENCODERS |= {
    "amr": ("amr", "libopencore_amrnb"),
    "3gp": ("3gp", "libopencore_amrnb"),
    "alaw": ("wav", "pcm_alaw"),
    "mulaw": ("wav", "pcm_mulaw"),
    "mulaw-au": ("au", "pcm_mulaw"),
    "alaw-aifc": ("aiff", "pcm_alaw"),
    "adpcm-ima": ("wav", "adpcm_ima_wav"),
    "adpcm-ms": ("wav", "adpcm_ms"),
    "adpcm-yamaha": ("wav", "adpcm_yamaha"),
    "adpcm-caf": ("caf", "adpcm_ima_qt"),
    "adpcm-flv": ("flv", "adpcm_swf"),
    "g722": ("wav", "g722"),
    "g726": ("wav", "g726"),
    "nellymoser": ("flv", "nellymoser"),
    "f32be-aiff": ("aiff", "pcm_f32be"),
    "f64be-au": ("au", "pcm_f64be"),
}


def tone(hz: float, duration_s: float, rate: int, *, channels: int = 1, level: float = 0.5) -> Samples:
    """Makes a sine, which is equal in all channels: [C, T]."""
    t = np.arange(round(duration_s * rate)) / rate
    return np.tile((level * np.sin(2 * np.pi * hz * t)).astype(np.float32), (channels, 1))


def noise(duration_s: float, rate: int, *, channels: int = 1, rms: float = 0.1, seed: int = 0) -> Samples:
    """Makes white noise, which differs between the channels: [C, T]."""
    draw = np.random.default_rng(seed).standard_normal((channels, round(duration_s * rate)))
    return (rms * draw).astype(np.float32)


def level_at(samples: Samples, rate: int, hz: float) -> npt.NDArray[np.float64]:
    """Returns the amplitude of the sine at `hz` in each channel, for any phase: [C, T] -> [C]."""
    t = np.arange(samples.shape[1])
    window = np.hanning(len(t))
    return 2 * np.abs((samples * window) @ np.exp(-2j * np.pi * hz / rate * t)) / window.sum()


def loudest_hz(samples: Samples, rate: int) -> float:
    """Returns the frequency of the highest peak in the spectrum of the first channel."""
    spectrum = np.abs(np.fft.rfft(samples[0] * np.hanning(samples.shape[1])))
    return float(spectrum.argmax() * rate / samples.shape[1])


def encode(samples: Samples, rate: int, kind: str, *, layout: str | None = None) -> bytes:
    """Encodes samples to a file.

    Args:
        samples: [C, T].
        rate: in Hz.
        kind: one of `ENCODERS`, or `ogg`.
        layout: FFmpeg's name of the channel layout, such as 5.1; by default mono or stereo.
    """
    if kind == "ogg":  # Vorbis: FFmpeg's own encoder is experimental, libsndfile has the reference one
        return written(samples, rate, format="OGG", subtype="VORBIS")
    container, codec = ENCODERS[kind]
    layout = layout or {1: "mono", 2: "stereo"}[len(samples)]
    packed = np.ascontiguousarray(samples.T).reshape(1, -1)
    frame = av.AudioFrame.from_ndarray(packed, format="flt", layout=layout)
    frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), 0
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream(codec, rate=rate, layout=layout)
        if codec.startswith(("aac", "libmp3", "mp2", "ac3", "eac3", "libopus", "wma")):
            stream.bit_rate = 96_000 * len(samples)
        for packet in (*stream.encode(frame), *stream.encode(None)):
            out.mux(packet)
    return file.getvalue()


def written(samples: Samples, rate: int, *, format: str = "WAV", subtype: str = "PCM_16") -> bytes:
    """Encodes samples with libsndfile, independently of FFmpeg. Its wav states no channel layout."""
    file = io.BytesIO()
    soundfile.write(file, samples.T, rate, format=format, subtype=subtype)
    return file.getvalue()


def dsf(hz: float, duration_s: float) -> bytes:
    """Makes a sine as Sony's DSF, one-bit samples at 2.8 MHz, which FFmpeg decodes to 352.8 kHz."""
    rate, block = 2_822_400, 4096 * 8
    sums = np.floor(np.cumsum((tone(hz, duration_s, rate)[0].astype(np.float64) + 1) / 2))
    bits = np.diff(sums, prepend=0).astype(np.uint8)
    bits = bits[: len(bits) // block * block]
    form = struct.pack("<4sQIIIIIIQII", b"fmt ", 52, 1, 0, 1, 1, rate, 1, len(bits), 4096, 0)
    data = struct.pack("<4sQ", b"data", 12 + len(bits) // 8) + np.packbits(bits, bitorder="little").tobytes()
    return struct.pack("<4sQQQ", b"DSD ", 28, 28 + len(form) + len(data), 0) + form + data


def silent_ape(samples: int, rate: int) -> bytes:
    """Makes a silent file of Monkey's Audio, whose frames may state that they are silent and hold no data."""
    frames, last = divmod(samples, 73_728)
    form = struct.pack("<HHIIIHHI", 2000, 0, 73_728, last, frames + 1, 16, 2, rate)
    start = 52 + len(form) + 4 * (frames + 1)
    offsets = struct.pack(f"<{frames + 1}I", *(start + 16 * i for i in range(frames + 1)))
    sizes = (52, len(form), len(offsets), 0, 0, 0, 0)
    head = struct.pack("<4sHH7I16x", b"MAC ", 3990, 0, *sizes)
    return head + form + offsets + struct.pack("<II8x", 1 << 31, 3) * (frames + 1)


def silent_amr_wb(frames: int) -> bytes:
    """Makes frames of 20 ms without data, as a phone writes them while nobody speaks."""
    return b"#!AMR-WB\n" + b"\x7c" * frames


def dts(samples: Samples, rate: int) -> bytes:
    """Encodes samples to DTS with the ffmpeg of imageio-ffmpeg, as PyAV lacks the encoder."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", "-", "-strict", "-2", "-c:a", "dca"]
    wav = written(samples, rate)
    return subprocess.run([*command, "-f", "dts", "-"], input=wav, capture_output=True, check=True).stdout


def wav_without_samples() -> bytes:
    """Makes a wav of 44 bytes: a header only."""
    return _wav_header(0)


def wav_that_lies(samples: Samples, rate: int, claimed: int) -> bytes:
    """Makes a 16-bit mono wav whose header states `claimed` bytes of samples."""
    pcm = (samples[0] * 32767).astype("<i2").tobytes()
    return _wav_header(claimed, rate) + pcm


def _wav_header(data_bytes: int, rate: int = 44_100) -> bytes:
    riff = struct.pack("<4sI4s", b"RIFF", (36 + data_bytes) & 0xFFFFFFFF, b"WAVE")
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, rate, 2 * rate, 2, 16)
    return riff + form + struct.pack("<4sI", b"data", data_bytes)


def png(side: int = 1) -> bytes:
    """Makes a black picture; a large one is a small file."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    pixels = zlib.compressobj(9)
    row = bytes(1 + side)
    body = b"".join([*(pixels.compress(row) for _ in range(side)), pixels.flush()])
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def read_tags(path: Path) -> dict[str, str]:
    """Reads the title and comment of a wav or mp3, with other libraries than those that write them."""
    if path.suffix == ".mp3":
        tags = mutagen.id3.ID3(path)
        found = {"title": tags.getall("TIT2"), "comment": tags.getall("COMM")}
        return {name: str(frames[0]) for name, frames in found.items() if frames}
    with av.open(str(path)) as container:
        return dict(container.metadata)
