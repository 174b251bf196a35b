"""Reading a clip: the pitch, level, length and position of the samples, and the errors of refused files."""

import os
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import soxr
import torch
from sounds import (
    KINDS,
    Samples,
    encode,
    level_at,
    loudest_hz,
    noise,
    tone,
    wav_that_lies,
    written,
)

from musicgen_svc.audio.decoding import _packets
from musicgen_svc.audio.reading import read_clip
from musicgen_svc.errors import AudioError

RATE = 32_000


# The largest number of padding samples in formats that do not state it.
PADDING = {kind: 3 * 1024 for kind in ("aac", "latm", "aac-flv", "aac-ts", "wma")}
PADDING |= {kind: 3 * 1152 for kind in ("mp2", "mp2-mpeg", "mp3-mkv", "mp3-avi")}
PADDING |= {kind: 1536 for kind in ("ac3", "ac3-ts", "eac3")} | {"ogg": 1024, "caf-alac": 4096}


def rates(kind: str) -> list[int]:
    """Returns sample rates that a format supports, from 8 to 192 kHz."""
    if kind in ("opus", "webm"):
        return [8_000, 16_000, 48_000]
    if kind in ("mp2", "mp2-mpeg", "ac3", "ac3-ts", "eac3"):
        return [32_000, 44_100, 48_000]
    if kind in ("mp3", "mp3-mkv", "mp3-avi", "m4a", "aac", "aac-flv", "aac-ts", "latm"):
        return [8_000, 22_050, 44_100, 48_000]
    if kind == "wma":
        return [22_050, 44_100, 48_000]
    return [8_000, 11_025, 32_000, 44_100, 96_000, 192_000]


@pytest.mark.parametrize(
    ("kind", "rate"), [(kind, rate) for kind in KINDS for rate in rates(kind)], ids=lambda value: str(value)
)
@pytest.mark.parametrize("channels", [1, 2])
def test_every_format_keeps_pitch_level_and_length(
    read: Callable[..., torch.Tensor], kind: str, rate: int, channels: int
) -> None:
    clip = read(encode(tone(440, 1.21, rate, channels=channels, level=0.5), rate, kind), channels=channels)
    samples = clip.numpy()
    assert len(samples) == channels
    assert loudest_hz(samples, RATE) == pytest.approx(440, abs=1)
    assert level_at(samples, RATE, 440) == pytest.approx(0.5, rel=0.07)
    slack_s = PADDING.get(kind, 0) / rate + 1.5 / min(rate, RATE)
    assert samples.shape[1] / RATE == pytest.approx(1.21, abs=slack_s)


@pytest.mark.parametrize("kind", ["mp3", "m4a", "opus", "webm", "ogg", "flac", "wav16"])
def test_sound_keeps_its_position(read: Callable[..., torch.Tensor], kind: str) -> None:
    """Encoder delay is removed: a tone that begins after 0.5 s still begins there."""
    sound = tone(440, 1, 48_000)
    sound[:, :24_000] = 0
    audible = np.abs(read(encode(sound, 48_000, kind)).numpy()[0]) > 0.25
    assert audible.argmax() / RATE == pytest.approx(0.5, abs=0.005)


def test_left_and_right_stay_apart_and_mono_is_their_mean(read: Callable[..., torch.Tensor]) -> None:
    sides = np.concatenate([tone(440, 1, 44_100, level=0.6), tone(1000, 1, 44_100, level=0.2)])
    content = encode(sides, 44_100, "flac")
    stereo, mono = (read(content, channels=channels).numpy() for channels in (2, 1))
    assert level_at(stereo, RATE, 440) == pytest.approx([0.6, 0], abs=1e-3)
    assert level_at(stereo, RATE, 1000) == pytest.approx([0, 0.2], abs=1e-3)
    np.testing.assert_allclose(mono[0], stereo.mean(0), atol=1e-6)


def test_stereo_from_mono_has_two_equal_channels(read: Callable[..., torch.Tensor]) -> None:
    left, right = read(encode(tone(440, 0.5, 44_100), 44_100, "wav16"), channels=2)
    assert left.equal(right)
    assert level_at(left[None].numpy(), RATE, 440) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("kind", ["wav16", "wavf32", "flac", "m4a", "opus"])
@pytest.mark.parametrize(
    ("speaker", "left", "right"),
    [(0, 1, 0), (1, 0, 1), (2, 0.5**0.5, 0.5**0.5), (3, 0, 0), (4, 0.5**0.5, 0), (5, 0, 0.5**0.5)],
    ids=["front-left", "front-right", "centre", "subwoofer", "side-left", "side-right"],
)  # fmt: skip
def test_surround_is_mixed_by_the_standard_matrix(
    read: Callable[..., torch.Tensor], kind: str, speaker: int, left: float, right: float
) -> None:
    """ITU-R BS.775 mixes centre and surrounds at -3 dB; the sum is scaled so that it does not clip."""
    sound = np.zeros((6, 24_000), np.float32)
    sound[speaker] = tone(100, 0.5, 48_000)
    samples = read(encode(sound, 48_000, kind, layout="5.1"), channels=2).numpy()
    scale = 0.5 / (1 + 2 * 0.5**0.5)
    assert level_at(samples, RATE, 100) == pytest.approx([left * scale, right * scale], abs=0.006)


@pytest.mark.parametrize("channels", [3, 4, 5, 6, 7, 8])
def test_channels_in_no_stated_order_are_mixed_too(read: Callable[..., torch.Tensor], channels: int) -> None:
    samples = read(written(tone(440, 0.3, 44_100, channels=channels), 44_100)).numpy()
    assert level_at(samples, RATE, 440)[0] > 0.3
    assert np.abs(samples).max() < 0.51


@pytest.mark.parametrize("name", ["clip.mp3", "clip.txt", "clip.m3u8", "clip.flac", "concat:clip"])
def test_the_name_of_a_file_has_no_effect(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(encode(tone(440, 0.5, 44_100), 44_100, "flac"))
    samples = read_clip(path, sample_rate=RATE, channels=1).numpy()
    assert loudest_hz(samples, RATE) == pytest.approx(440, abs=2)
    path.write_bytes(np.random.default_rng(0).bytes(100_000))
    with pytest.raises(AudioError, match="is not audio"):  # by its name it would be a flac without samples
        read_clip(path, sample_rate=RATE, channels=1)


@pytest.mark.parametrize("rate", [8_000, 11_025, 32_000, 44_100, 192_000])
def test_resampling_in_blocks_equals_resampling_at_once(read: Callable[..., torch.Tensor], rate: int) -> None:
    sound = noise(3.3, rate, channels=2)
    samples = read(encode(sound, rate, "wavf32"), channels=2).numpy()
    expected = sound.T if rate == RATE else soxr.resample(sound.T, rate, RATE, "HQ")
    np.testing.assert_array_equal(samples, expected.T)
    assert samples.shape[1] == round(sound.shape[1] * RATE / rate)


@pytest.mark.parametrize("rate", [32_000, 44_100])
@pytest.mark.parametrize(
    ("start_s", "end_s", "kept"),
    [
        (0, None, slice(0, None)),
        (0, 1, slice(0, 1)),
        (1, 2, slice(1, 2)),
        (2, None, slice(2, None)),
        (2, 99, slice(2, None)),
        (3, 4, slice(3, None)),
        (1, 10**9, slice(1, None)),
    ],
)
def test_selection_is_a_cut_at_whole_seconds(
    read: Callable[..., torch.Tensor], rate: int, start_s: int, end_s: int | None, kept: slice
) -> None:
    sound = noise(3.3, rate)
    clip = read(encode(sound, rate, "wavf32"), start_s=start_s, end_s=end_s)
    part = sound[:, kept.start * rate : None if kept.stop is None else kept.stop * rate]
    expected = part if rate == RATE else soxr.resample(part.T, rate, RATE, "HQ").T
    np.testing.assert_array_equal(clip.numpy(), expected)


@pytest.mark.parametrize(
    ("start_s", "end_s", "said"),
    [
        (3, None, "3 s and input_audio"),
        (10**9, None, f"{10**9} s and input_audio"),
        (4, 5, "4 s and input_audio"),
        (2, 1, "2 s, continuation_end is 1 s and input_audio"),
        (0, 0, "0 s, continuation_end is 0 s and input_audio"),
    ],
)
def test_a_start_behind_the_end_is_refused_with_the_length(
    read: Callable[..., torch.Tensor], start_s: int, end_s: int | None, said: str
) -> None:
    with pytest.raises(AudioError, match=rf"^continuation_start is {said} is 3\.00 s long; "):
        read(encode(noise(3, 32_000), 32_000, "wav16"), start_s=start_s, end_s=end_s)


def test_a_file_ends_where_it_cannot_be_read_any_further() -> None:
    class BreaksOff:
        def demux(self, stream: object) -> Iterator[object]:
            yield from (1, 2)
            raise av.error.InvalidDataError(1, "Invalid data found")

    assert [*_packets(BreaksOff(), None)] == [1, 2]  # type: ignore[arg-type]


def test_a_stream_that_begins_later_does_not_end_the_one_that_is_read() -> None:
    class BeginsLater:
        def __init__(self) -> None:
            self.left = [
                1,
                IndexError("list index out of range"),
                2,
                IndexError("list index out of range"),
                3,
            ]

        def demux(self, stream: object) -> Iterator[object]:
            while self.left:
                packet = self.left.pop(0)
                if isinstance(packet, Exception):
                    raise packet
                yield packet

    assert [*_packets(BeginsLater(), None)] == [1, 2, 3]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "playlist",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.wav\n#EXT-X-ENDLIST\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/x.wav\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile secret.wav\n",
        "<?xml version='1.0'?><MPD><Period><AdaptationSet><Representation><BaseURL>secret.wav</BaseURL>"
        "</Representation></AdaptationSet></Period></MPD>",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 9 RTP/AVP 14\n",
        ";FFMETADATA1\ntitle=secret.wav\n",
    ],
    ids=["hls", "hls to a server", "concat", "dash", "sdp", "ffmetadata"],
)
def test_a_playlist_opens_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, playlist: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.wav").write_bytes(encode(tone(440, 1, 44_100), 44_100, "wav16"))
    for name in ("clip", "clip.m3u8", "clip.ffconcat", "clip.mpd"):
        (tmp_path / name).write_text(playlist)
        with pytest.raises(AudioError, match="not audio"):
            read_clip(Path(name), sample_rate=RATE, channels=1)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    for name, word in (("pipe", "regular file"), (".", "regular file"), ("absent", "No such file")):
        with pytest.raises(AudioError, match=word):
            read_clip(tmp_path / name, sample_rate=RATE, channels=1)


def test_size_is_limited_to_the_byte(read: Callable[..., torch.Tensor]) -> None:
    content = encode(tone(440, 1, 44_100), 44_100, "wav16")
    assert read(content, max_bytes=len(content)).numel()
    with pytest.raises(AudioError, match=f"input_audio is {len(content):,} bytes.* at most"):
        read(content, max_bytes=len(content) - 1)


def test_a_hundred_megabytes_are_the_default_limit(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(100 * 2**20 + 1)
    with pytest.raises(
        AudioError, match=r"104,857,601 bytes; it must be at most 104,857,600 bytes \(100 MB\)"
    ):
        read_clip(tmp_path / "large", sample_rate=RATE, channels=1)


@pytest.mark.parametrize("claimed", [16_000, 0, 2**32 - 1])
def test_length_is_limited_by_what_is_decoded(read: Callable[..., torch.Tensor], claimed: int) -> None:
    """Neither the length in the header nor a short selection changes the limit."""
    sound = tone(440, 3, 8_000)
    claimed = claimed or 2 * sound.shape[1]
    content = wav_that_lies(sound, 8_000, claimed)
    length_s = min(claimed / 16_000, 3)
    assert read(content, max_duration_s=length_s).shape[1] == length_s * RATE
    with pytest.raises(AudioError, match="input_audio is longer than"):
        read(content, max_duration_s=length_s - 0.001, end_s=1)


def test_fifteen_minutes_are_the_default_limit(read: Callable[..., torch.Tensor]) -> None:
    with pytest.raises(AudioError, match=r"longer than 900 s.*\(15 minutes\)"):
        read(wav_that_lies(np.zeros((1, 901 * 8_000), np.float32), 8_000, 0))


def test_progress_only_rises_and_reaches_the_total(
    read: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("musicgen_svc.audio.decoding.TICK_S", 0)
    calls: list[tuple[int, int]] = []
    content = encode(tone(440, 3, 44_100), 44_100, "mp3")
    read(content, tick=lambda done, total: calls.append((done, total)))
    done = [at for at, _ in calls]
    assert len(done) > 50
    assert done == sorted(done)
    assert {total for _, total in calls} == {len(content)}
    assert done[-1] == len(content)


@pytest.mark.parametrize("kind", ["mp3", "wav16", "webm"])
def test_a_raising_tick_ends_the_reading_and_leaks_nothing(
    read: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("musicgen_svc.audio.decoding.TICK_S", 0)

    def stop(done: int, total: int) -> None:
        if done > total / 3:
            raise KeyboardInterrupt

    content = encode(tone(440, 3, 48_000), 48_000, kind)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(KeyboardInterrupt):
        read(content, tick=stop)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_memory_grows_with_the_result_and_not_with_the_source(read: Callable[..., torch.Tensor]) -> None:
    """A second of the source is in memory at a time, however much is cut off or mixed down."""
    sound: Samples = np.zeros((8, 192_000 * 10), np.float32)
    content = encode(sound, 192_000, "wav16", layout="7.1")
    decoded = sound.nbytes
    del sound
    tracemalloc.start()
    try:
        read(content, channels=1, start_s=1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < decoded / 8
