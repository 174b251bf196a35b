"""A corpus of generated files, as people and programs make them: each is read correctly, or refused.

An entry has a name, a function that makes the file, and the expected result: the length, pitch and level of
the tone in it, or words of the sentence that refuses it.
"""

import io
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import av
import mutagen.flac
import mutagen.id3
import numpy as np
import pytest
import torch
from sounds import (
    KINDS,
    Samples,
    dsf,
    dts,
    encode,
    level_at,
    loudest_hz,
    noise,
    png,
    silent_amr_wb,
    silent_ape,
    tone,
    wav_that_lies,
    wav_without_samples,
    written,
)

from musicgen_svc.audio.formats import CONTAINERS
from musicgen_svc.errors import AudioError

RATE = 32_000


def second(kind: str = "wav16", rate: int = 44_100, channels: int = 1) -> bytes:
    """Makes a file of one second of 440 Hz."""
    return encode(tone(440, 1, rate, channels=channels), rate, kind)


def with_sample(value: float, kind: str = "wavf32") -> bytes:
    """Makes a file in which one sample has this value."""
    sound = tone(440, 1, 44_100)
    sound[0, 20_000] = value
    return encode(sound, 44_100, kind)


def at_rate(rate: int) -> bytes:
    """Makes a wav whose header has this sample rate."""
    content = bytearray(written(tone(440, 0.1, 44_100), 44_100))
    content[24:28] = rate.to_bytes(4, "little")
    return bytes(content)


def video(codec: str | None = None) -> bytes:
    """Makes a film of one second, with a tone if a codec is given."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as out:
        picture = out.add_stream("mpeg4", rate=10)
        picture.width = picture.height = 64
        sound = out.add_stream(codec, rate=44_100, layout="mono") if codec else None
        for _ in range(10):
            out.mux(picture.encode(av.VideoFrame.from_ndarray(np.full((64, 64), 99, np.uint8), "gray")))
        out.mux(picture.encode(None))
        if sound:
            samples = (tone(440, 1, 44_100) * 32767).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(samples, "s16", "mono")
            frame.sample_rate = 44_100
            out.mux([*sound.encode(frame), *sound.encode(None)])
    return file.getvalue()


def damaged(content: bytes, share: float) -> bytes:
    """Overwrites a part of a file with noise, in the middle."""
    result, length = bytearray(content), int(len(content) * share)
    start = (len(content) - length) // 2
    result[start : start + length] = np.random.default_rng(0).bytes(length)
    return bytes(result)


def latin1_tags() -> bytes:
    """Makes a wav with a tag in Latin-1."""
    body = b"INFOIART\x06\0\0\0Bj\xf6rk\0"
    return encode(tone(440, 1, 44_100), 44_100, "wav16") + b"LIST" + len(body).to_bytes(4, "little") + body


def w64_that_points_outside() -> bytes:
    """Makes a W64 file whose chunk of samples states more bytes than any file has."""
    content = bytearray(written(tone(440, 1, 44_100), 44_100, format="W64"))
    content[content.index(b"data") + 21] = 255
    return bytes(content)


def with_cover() -> bytes:
    """Makes a flac with a large picture."""
    file = io.BytesIO(second("flac"))
    tags, cover = mutagen.flac.FLAC(file), mutagen.flac.Picture()
    cover.data, cover.mime, cover.type = png(3000), "image/png", 3
    tags.add_picture(cover)
    file.seek(0)
    tags.save(file)
    return file.getvalue()


def wav(samples: Samples, rate: int, *, extensible: bool = False, odd_chunk: bool = False) -> bytes:
    """Makes a 16-bit wav without a library."""
    channels = len(samples)
    tag = 0xFFFE if extensible else 1
    form = struct.pack("<HHIIHH", tag, channels, rate, 2 * channels * rate, 2 * channels, 16)
    if extensible:
        pcm = struct.pack("<IHH8B", 1, 0, 16, 0x80, 0, 0, 0xAA, 0, 0x38, 0x9B, 0x71)
        form += struct.pack("<HHI", 22, 16, (1 << channels) - 1) + pcm
    data = (samples.T * 32767).astype("<i2").tobytes()
    odd = b"junk" + struct.pack("<I", 3) + b"abc\0" if odd_chunk else b""
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form + odd + b"data" + struct.pack("<I", len(data))
    return b"RIFF" + struct.pack("<I", len(body) + len(data)) + body + data


def fragmented_mp4(content: bytes) -> bytes:
    """Converts an m4a to fragments, as streaming sites send them."""
    file = io.BytesIO()
    with av.open(io.BytesIO(content)) as source:
        flags = {"movflags": "frag_keyframe+empty_moov+default_base_moof", "frag_duration": "200000"}
        with av.open(file, "w", format="mp4", options=flags) as out:
            stream = out.add_stream_from_template(source.streams.audio[0])
            for packet in source.demux(audio=0):
                if packet.dts is not None:
                    packet.stream = stream
                    out.mux(packet)
    return file.getvalue()


def two_tracks(first: Samples, other: Samples, *, default: int | None) -> bytes:
    """Makes a Matroska file with two tracks, one of which may be the default."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as out:
        streams = [out.add_stream("flac", rate=44_100, layout="mono") for _ in range(2)]
        for index, stream in enumerate(streams):
            stream.disposition = av.stream.Disposition.default if index == default else 0
        for stream, samples in zip(streams, (first, other), strict=True):
            frame = av.AudioFrame.from_ndarray((samples * 32767).astype(np.int16), "s16", "mono")
            frame.sample_rate, frame.time_base, frame.pts = 44_100, Fraction(1, 44_100), 0
            out.mux([*stream.encode(frame), *stream.encode(None)])
    return file.getvalue()


def zipped(content: bytes) -> bytes:
    """Makes a zip archive without compression."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("song.mp3", content)
    return file.getvalue()


def tarred(content: bytes) -> bytes:
    """Makes a tar archive."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        entry = tarfile.TarInfo("song.mp3")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def gzipped(content: bytes) -> bytes:
    """Makes a gzip archive without compression, so that mp3 frames in it can be found."""
    parts = [content[i : i + 65_535] for i in range(0, len(content), 65_535)]
    blocks = (struct.pack("<BHH", 0, len(part), 0xFFFF ^ len(part)) + part for part in parts)
    return b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + b"".join(blocks)


def in_document(content: bytes) -> bytes:
    """Makes a PDF document that contains a file."""
    stream = b"%%PDF-1.7\n1 0 obj\n<</Length %d>>stream\n" % len(content)
    return stream + content + b"\nendstream\nendobj\n%%EOF\n"


def broken_id3(content: bytes) -> bytes:
    """Makes an mp3 whose ID3 tag states half its size, so that bytes of its picture come before the sound."""
    random_bytes = random.Random(0).randbytes(9_000).replace(b"\xff", b"\xfe")
    return b"ID3\x03\0\0\0\0\x23\x28"[:10] + random_bytes + content


def tagged(content: bytes, cover: bytes) -> bytes:
    """Adds a title and a picture to an mp3."""
    file = io.BytesIO(content)
    tags = mutagen.id3.ID3()
    tags.add(mutagen.id3.TIT2(text="Title"))
    tags.add(mutagen.id3.APIC(mime="image/png", type=3, data=cover))
    tags.save(file)
    return file.getvalue()


@dataclass(frozen=True)
class Readable:
    """A file that is read, and what the samples are."""

    make: Callable[[], bytes]
    seconds: float = 1.0
    slack_s: float = 0.001
    level: float | None = 0.5
    """The level of the sine; 0: silence; None: not tested."""
    hz: float | None = 440
    """The pitch of the sine; None: not tested."""


def frames(samples: int, rate: int, number: int = 2) -> float:
    """Returns the length of some frames in seconds: the padding that a format may add without stating it."""
    return number * samples / rate + 0.001


READABLE = {
    "alaw": Readable(lambda: second("alaw")),
    "mulaw": Readable(lambda: second("mulaw")),
    "mulaw in au": Readable(lambda: second("mulaw-au")),
    "alaw in aiff-c": Readable(lambda: second("alaw-aifc")),
    "float aiff-c": Readable(lambda: second("f32be-aiff")),
    "double au": Readable(lambda: second("f64be-au")),
    "IMA ADPCM": Readable(lambda: second("adpcm-ima"), slack_s=0.06),
    "Microsoft ADPCM": Readable(lambda: second("adpcm-ms"), slack_s=0.06),
    "Yamaha ADPCM": Readable(lambda: second("adpcm-yamaha"), slack_s=0.06),
    "IMA ADPCM in caf": Readable(lambda: second("adpcm-caf"), slack_s=0.01),
    "ADPCM in flv": Readable(lambda: second("adpcm-flv", 22_050), slack_s=0.2),
    "G.722": Readable(lambda: second("g722", 16_000), slack_s=0.01),
    "G.726": Readable(lambda: second("g726", 8_000), slack_s=0.01),
    "a phone's amr": Readable(lambda: second("amr", 8_000), slack_s=0.021, level=None),
    "a phone's 3gp": Readable(lambda: second("3gp", 8_000), slack_s=0.021, level=None),
    "a phone's wide-band amr": Readable(lambda: silent_amr_wb(50), level=0),
    "Monkey's Audio": Readable(lambda: silent_ape(44_100, 44_100), level=0),
    "DTS": Readable(lambda: dts(tone(440, 1, 48_000, channels=2), 48_000), slack_s=frames(512, 48_000)),
    "DSD": Readable(lambda: dsf(440, 1.0), slack_s=0.02),
    "caf by libsndfile": Readable(lambda: written(tone(440, 1, 44_100), 44_100, format="CAF")),
    "RF64": Readable(lambda: written(tone(440, 1, 44_100), 44_100, format="RF64")),
    "W64": Readable(lambda: written(tone(440, 1, 44_100), 44_100, format="W64")),
    "wav of 8 signed bits in aiff": Readable(
        lambda: written(tone(440, 1, 44_100), 44_100, format="AIFF", subtype="PCM_S8")
    ),
    "little-endian aiff-c": Readable(
        lambda: written(tone(440, 1, 44_100), 44_100, format="AIFF", subtype="PCM_24")
    ),
    "mp3 by libsndfile": Readable(
        lambda: written(tone(440, 1, 44_100), 44_100, format="MP3", subtype="MPEG_LAYER_III")
    ),
    "opus by libsndfile": Readable(
        lambda: written(tone(440, 1, 48_000), 48_000, format="OGG", subtype="OPUS")
    ),
    "4 kHz": Readable(lambda: second("wav16", 4_000)),
    "384 kHz": Readable(lambda: second("wav16", 384_000)),
    "WAVE_FORMAT_EXTENSIBLE": Readable(
        lambda: wav(tone(440, 1, 44_100, channels=2), 44_100, extensible=True)
    ),
    "a chunk of odd length": Readable(lambda: wav(tone(440, 1, 44_100), 44_100, odd_chunk=True)),
    "film with sound": Readable(lambda: video("aac"), slack_s=0.06),
    "fragmented mp4": Readable(lambda: fragmented_mp4(second("m4a")), slack_s=frames(1024, 44_100)),
    "chained ogg": Readable(lambda: second("ogg") + second("ogg"), 2.0, frames(1024, 44_100, 4), level=None),
    "junk before an mp3": Readable(lambda: random.Random(0).randbytes(1_000) + second("mp3"), slack_s=0.1),
    "broken ID3": Readable(lambda: broken_id3(second("mp3")), slack_s=0.1),
    "mp3 with a cover": Readable(lambda: tagged(second("mp3"), png(300))),
    "zip behind an mp3": Readable(lambda: second("mp3") + zipped(b"notes"), slack_s=0.06),
    "flac with a cover": Readable(lambda: with_cover()),
    "tags that are not UTF-8": Readable(lambda: latin1_tags()),
    "default track second": Readable(
        lambda: two_tracks(tone(440, 1, 44_100) * 0, tone(440, 1, 44_100), default=1)
    ),
    "default track silent": Readable(
        lambda: two_tracks(tone(440, 1, 44_100) * 0, tone(440, 1, 44_100), default=0), level=0
    ),
    "no default track": Readable(
        lambda: two_tracks(tone(440, 1, 44_100), tone(440, 1, 44_100) * 0, default=None)
    ),
    "truncated mp3": Readable(lambda: second("mp3")[:-5000], 0.5, slack_s=0.2),
    "truncated wav": Readable(lambda: second("wav24")[:-66_151], 0.5),
    "truncated caf": Readable(lambda: second("caf")[:-66_150], 0.5, slack_s=0.002),
    "truncated aiff": Readable(lambda: second("aiff")[:-44_100], 0.5, slack_s=0.002),
    "truncated flac": Readable(
        lambda: encode(noise(1, 44_100), 44_100, "flac")[:-30_000], 0.5, 0.25, None, hz=None
    ),
    "header claims more": Readable(lambda: wav_that_lies(tone(440, 1, 44_100), 44_100, 10**9)),
    "length unknown": Readable(lambda: wav_that_lies(tone(440, 1, 44_100), 44_100, 2**32 - 1)),
    "header claims nothing": Readable(lambda: wav_that_lies(tone(440, 1, 44_100), 44_100, 0)),
    "claims less": Readable(lambda: wav_that_lies(tone(440, 1, 44_100), 44_100, 44_100), 0.5),
    "offset beyond any file": Readable(lambda: w64_that_points_outside()),
    "damaged mp3": Readable(
        lambda: damaged(encode(tone(440, 4, 44_100), 44_100, "mp3"), 0.2), 3.5, 0.6, None, hz=None
    ),
    "damaged flac": Readable(
        lambda: damaged(encode(noise(4, 44_100), 44_100, "flac"), 0.2), 3.5, 0.6, None, hz=None
    ),
    "a little above full scale": Readable(lambda: with_sample(1.5), level=None),
}


@pytest.mark.parametrize("name", READABLE)
def test_what_a_player_plays_is_read_correctly(
    read: Callable[..., torch.Tensor], capfd: pytest.CaptureFixture[str], name: str
) -> None:
    entry = READABLE[name]
    clip = read(entry.make())
    samples = clip.numpy()
    assert samples.shape[1] / RATE == pytest.approx(entry.seconds, abs=entry.slack_s)
    assert np.isfinite(samples).all()
    if entry.level == 0:
        assert not samples.any()
    elif entry.hz is not None:
        assert loudest_hz(samples, RATE) == pytest.approx(entry.hz, abs=3)
        if entry.level is not None:
            assert level_at(samples, RATE, entry.hz) == pytest.approx(entry.level, rel=0.1)
    assert capfd.readouterr() == ("", ""), "FFmpeg wrote to the log"


REFUSED: dict[str, tuple[Callable[[], bytes], list[str]]] = {
    "empty": (lambda: b"", ["empty", "0 bytes"]),
    "text": (lambda: b"These are words, not sound.\n" * 100, ["not audio"]),
    "png": (png, ["picture"]),
    "zeros": (lambda: bytes(100_000), ["not audio"]),
    "random bytes": (lambda: np.random.default_rng(0).bytes(100_000), ["not audio"]),
    "wav without samples": (wav_without_samples, ["no samples"]),
    "start of an mp3": (lambda: second("mp3")[:200], ["not audio"]),
    "NaN": (lambda: with_sample(np.nan), ["NaN"]),
    "Inf": (lambda: with_sample(np.inf), ["infinite"]),
    "-Inf in doubles": (lambda: with_sample(-np.inf, "wavf64"), ["infinite"]),
    "float wav on an integer scale": (lambda: with_sample(20_000), ["20000", "full scale at 1"]),
    "rate too low": (lambda: at_rate(3_999), ["3999 Hz", "between 4000 and 384000 Hz"]),
    "rate too high": (lambda: at_rate(400_000), ["400000 Hz"]),
    "9 channels": (lambda: written(noise(0.1, 44_100, channels=9), 44_100), ["9 channels", "5.1"]),
    "128 channels": (lambda: wav(noise(0.1, 8_000, channels=128), 8_000), ["128 channels", "5.1"]),
    "film without sound": (video, ["no sound"]),
    "exotic codec": (lambda: second("nellymoser", 8_000), ["nellymoser"]),
    "mostly noise": (lambda: damaged(encode(noise(9, 44_100), 44_100, "m4a"), 0.8), ["damaged"]),
    "zip": (lambda: zipped(second("mp3")), ["zip archive"]),
    "empty zip": (lambda: b"PK\x05\x06" + bytes(18), ["zip archive"]),
    "zip around a wav": (lambda: zipped(second()), ["zip archive"]),
    "tar": (lambda: tarred(second("mp3")), ["tar archive"]),
    "gzip": (lambda: gzipped(second("mp3")), ["gzip archive"]),
    "pdf": (lambda: in_document(second("mp3")), ["PDF"]),
    "web page": (lambda: b"\n<!DOCTYPE html><html>" + second("mp3"), ["web page"]),
    "midi": (lambda: b"MThd\0\0\0\6\0\0\0\1\0\x60MTrk\0\0\0\4\0\xff\x2f\0", ["MIDI", "notes"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_audio_is_refused_in_one_sentence(
    read: Callable[..., torch.Tensor], capfd: pytest.CaptureFixture[str], name: str
) -> None:
    make, words = REFUSED[name]
    with pytest.raises(AudioError) as caught:
        read(make())
    sentence = str(caught.value)
    for word in ("input_audio", "must be", *words):
        assert word in sentence
    assert "\n" not in sentence
    assert sentence.endswith(".")
    assert capfd.readouterr() == ("", ""), "FFmpeg wrote to the log"


def test_without_its_first_bytes_an_archive_would_be_read_as_audio(read: Callable[..., torch.Tensor]) -> None:
    """Proves that the test of the archives above is needed: FFmpeg finds the mp3 frames in them."""
    assert read(b"??" + zipped(second("mp3"))[2:]).shape[1] / RATE == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    "kind", ["mp3", "m4a", "flac", "ogg", "opus", "wav16", "aiff", "caf", "aac-ts", "wavpack"]
)
def test_every_truncation_gives_what_is_there_or_a_sentence(
    read: Callable[..., torch.Tensor], kind: str
) -> None:
    content = encode(noise(0.5, 48_000), 48_000, kind)
    seconds = []
    for cut in range(0, len(content), len(content) // 12):
        try:
            seconds.append(read(content[: len(content) - cut]).shape[1] / RATE)
        except AudioError:
            seconds.append(0)
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] > 0.45


def test_every_container_that_is_read_is_in_the_corpus() -> None:
    """A container without a file in the corpus may not work. FFmpeg tells the container of each file."""
    made = [second(kind, 48_000) for kind in KINDS]
    made += [entry.make() for name, entry in READABLE.items() if "truncated" not in name]
    seen = set()
    for content in made:
        with av.open(io.BytesIO(content), metadata_errors="replace") as container:
            seen |= set(container.format.name.split(","))
    assert set(CONTAINERS.split(",")) <= seen


def test_a_file_whose_sample_rate_changes_is_read_completely(read: Callable[..., torch.Tensor]) -> None:
    parts = [encode(tone(hz, 1.5, rate), rate, "mp3") for hz, rate in ((440, 44_100), (1000, 24_000))]
    clip = read(b"".join(parts))
    samples = clip.numpy()
    assert samples.shape[1] / RATE == pytest.approx(3, abs=0.1)
    assert loudest_hz(samples[:, : RATE // 2], RATE) == pytest.approx(440, abs=3)
    assert loudest_hz(samples[:, -RATE // 2 :], RATE) == pytest.approx(1000, abs=3)
    part = read(b"".join(parts), start_s=1, end_s=2).numpy()  # the change lies inside
    assert part.shape[1] == pytest.approx(RATE, abs=1)
    assert loudest_hz(part[:, : RATE // 3], RATE) == pytest.approx(440, abs=3)
    assert loudest_hz(part[:, -RATE // 3 :], RATE) == pytest.approx(1000, abs=3)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_read_or_refused_with_a_sentence(
    read: Callable[..., torch.Tensor], capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    """Random bytes make lengths and offsets beyond the end of the file, huge rates, and broken packets."""
    rate, random = 48_000 if "ac3" in kind else 16_000, np.random.default_rng(0)
    intact = encode(noise(0.3, rate), rate, kind)
    for _ in range(25):
        content = bytearray(intact)
        for position in random.integers(0, random.choice([400, len(content)]), random.integers(1, 9)):
            content[position] = random.choice([0, 127, 128, 255])
        try:
            assert read(bytes(content)).isfinite().all()
        except AudioError as error:
            assert str(error).startswith("input_audio ")
    assert capfd.readouterr() == ("", "")
