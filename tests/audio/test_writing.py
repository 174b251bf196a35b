"""Written files have the right samples, tags and lengths; a failed write leaves no file and says why."""

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import wave
from pathlib import Path

import av
import imageio_ffmpeg
import mutagen.id3
import mutagen.mp3
import mutagen.wave
import numpy as np
import pytest
import scipy.io.wavfile
import soundfile
import torch
from sounds import level_at, loudest_hz, noise, read_tags, tone

from musicgen_svc.audio.writing import write_audio
from musicgen_svc.errors import GenerationError

RATE = 32_000
TAGS = {"title": "MusicGen small 7", "comment": '{"seed": 7, "prompt": "café – 音楽 🎵"}'}
KINDS = ["wav", "mp3"]


def sound(channels: int = 1, duration_s: float = 1.3) -> torch.Tensor:
    return torch.from_numpy(tone(440, duration_s, RATE, channels=channels))


def decoded(path: Path) -> tuple[np.ndarray, int]:
    """Decodes a file with FFmpeg, which removes an mp3's padding: samples [C, T] and the sample rate."""
    with av.open(str(path)) as container:
        planar = [
            part.to_ndarray()
            for frame in container.decode(audio=0)
            for part in av.AudioResampler("fltp").resample(frame)
        ]
        return np.concatenate(planar, axis=1), container.streams.audio[0].rate


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [32_000, 44_100, 48_000])
@pytest.mark.parametrize("length", [1, 500, 40_001])
def test_a_written_file_has_the_samples_that_were_given(
    tmp_path: Path, kind: str, channels: int, rate: int, length: int
) -> None:
    path = tmp_path / f"song.{kind}"
    samples = tone(440, 1.3, rate, channels=channels)[:, :length]
    samples[-1] *= 0.5  # so that the channels differ
    write_audio(torch.from_numpy(samples), rate, path, TAGS)
    found, found_rate = decoded(path)
    assert found_rate == rate
    assert found.shape[0] == channels
    # An mp3 this short is mostly encoder delay, of which decoders keep a few samples.
    assert found.shape[1] == pytest.approx(length, abs=50 if kind == "mp3" and length < 1152 else 0)
    if kind == "wav":
        np.testing.assert_allclose(found, samples, atol=0.5 / 2**15)
    elif length > 10_000:
        assert loudest_hz(found, rate) == pytest.approx(440, abs=1)
        assert level_at(found, rate, 440) == pytest.approx(level_at(samples, rate, 440), rel=0.01)


def test_wav_is_16_bits_rounded_half_to_even(tmp_path: Path) -> None:
    steps = torch.tensor([[0, 0.5, 1.5, 2.5, -0.5, -1.5, 2**15, -(2**15), 2**15 - 1, 100.4]]) / 2**15
    write_audio(steps, RATE, tmp_path / "steps.wav", {})
    pcm, _ = soundfile.read(tmp_path / "steps.wav", dtype="int16")
    assert pcm.tolist() == [0, 0, 2, 2, 0, -2, 32767, -32768, 32767, 100]
    assert soundfile.info(tmp_path / "steps.wav").subtype == "PCM_16"


def test_mp3_is_320_kbit_per_second_constant(tmp_path: Path) -> None:
    path = tmp_path / "song.mp3"
    write_audio(torch.from_numpy(noise(3, RATE)).clamp(-1, 1), RATE, path, {})
    info = mutagen.mp3.MP3(path).info
    assert (info.bitrate, info.bitrate_mode) == (320_000, mutagen.mp3.BitrateMode.CBR)
    with av.open(str(path)) as container:
        sizes = {packet.size for packet in container.demux(audio=0) if packet.size}
    assert sizes == {320_000 // 8 * 1152 // RATE}


@pytest.mark.parametrize(
    ("rate", "written"),
    [(8_000, 32_000), (16_000, 32_000), (22_050, 44_100), (24_000, 48_000), (37_800, 48_000)],
)
def test_a_rate_without_320_kbit_in_mp3_is_resampled(rate: int, written: int, tmp_path: Path) -> None:
    path = tmp_path / "song.mp3"
    samples = torch.from_numpy(tone(440, 2, rate))
    write_audio(samples, rate, path, {})
    found, found_rate = decoded(path)
    assert found_rate == written and mutagen.mp3.MP3(path).info.bitrate == 320_000
    assert found.shape[1] / written == pytest.approx(2, abs=2 / rate)
    assert level_at(found, written, 440) == pytest.approx(level_at(samples.numpy(), rate, 440), rel=0.01)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (TAGS, TAGS),
        ({"title": "", "comment": "x"}, {"comment": "x"}),
        ({"title": "a=b; c\\d\n'\"", "comment": "-i /etc/hostname"}, None),
        ({"title": "half \ud83c, end\0ed", "comment": "x"}, {"title": "half ?, ended", "comment": "x"}),
        ({"title": "long", "comment": "🎵" * 2000}, None),
        ({}, {}),
    ],
    ids=["json", "empty", "special", "broken", "long", "none"],
)
def test_tags_are_found_by_other_readers(
    tmp_path: Path, kind: str, given: dict[str, str], kept: dict[str, str] | None
) -> None:
    path = tmp_path / f"song.{kind}"
    write_audio(sound(), RATE, path, given)
    kept = given if kept is None else kept
    found = {name: text for name, text in read_tags(path).items() if text}
    assert found == kept
    with av.open(str(path)) as container:  # what ffprobe shows
        assert {name: text for name, text in container.metadata.items() if text} == kept


@pytest.mark.filterwarnings("error")
def test_a_wav_is_read_by_all_libraries_without_a_warning(tmp_path: Path) -> None:
    """Therefore its tags are RIFF INFO only: an ID3 chunk, which mutagen would read, makes scipy warn."""
    path = tmp_path / "song.wav"
    write_audio(sound(2), RATE, path, TAGS)
    with wave.open(str(path)) as file:
        by_wave = np.frombuffer(file.readframes(file.getnframes()), np.int16).reshape(-1, 2)
    assert np.array_equal(soundfile.read(path, dtype="int16")[0], by_wave)
    assert np.array_equal(scipy.io.wavfile.read(path)[1], by_wave)
    assert decoded(path)[0].shape[1] == len(by_wave)
    assert mutagen.wave.WAVE(path).info.length == len(by_wave) / RATE

    tags = mutagen.wave.WAVE(path)
    tags.add_tags()
    tags.tags.add(mutagen.id3.TIT2(text=TAGS["title"]))
    tags.save()
    with pytest.raises(scipy.io.wavfile.WavFileWarning, match="not understood"):
        scipy.io.wavfile.read(path)


def test_same_samples_and_tags_give_the_same_bytes(tmp_path: Path) -> None:
    for kind in KINDS:
        write_audio(sound(2), RATE, tmp_path / f"first.{kind}", TAGS)
    time.sleep(1.1)  # a time stamp would be another one now
    for kind in KINDS:
        write_audio(sound(2), RATE, tmp_path / f"other.{kind}", TAGS)
        assert (tmp_path / f"first.{kind}").read_bytes() == (tmp_path / f"other.{kind}").read_bytes(), kind


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_replaces_an_existing_one_and_no_other_file_remains(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"song.{kind}"
    path.write_bytes(b"old")
    with path.open("rb") as reader:
        write_audio(sound(), RATE, path, TAGS)
        assert reader.read() == b"old", "a reader of the old file must not see a part of the new one"
    assert decoded(path)[0].shape == (1, sound().shape[1])
    assert [*tmp_path.iterdir()] == [path]
    path.with_name("new").touch()
    assert path.stat().st_mode == path.with_name("new").stat().st_mode


@pytest.mark.parametrize("kind", KINDS)
def test_the_machines_temporary_folder_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    write_audio(sound(), RATE, tmp_path / f"song.{kind}", TAGS)


def fake_ffmpeg(folder: Path, script: str) -> None:
    """Writes a script with the name ffmpeg to the folder `bin`."""
    (folder / "bin").mkdir()
    program = folder / "bin" / "ffmpeg"
    program.write_text(f"#!{shutil.which('bash')}\n{script}\n")
    program.chmod(0o755)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("exit 3", ["ffmpeg failed"]),
        ('echo "Error writing trailer: No space left on device" >&2; exit 1', ["No space left on device"]),
        ("exit 0", ["shorter"]),
        ('printf half >"${@: -1}"; exit 0', ["shorter"]),
        ('printf half >"${@: -1}"; exit 1', ["ffmpeg failed"]),
        ("kill -9 $$", ["ffmpeg failed"]),
    ],
    ids=["fails", "disk full", "writes nothing", "writes half", "half and fails", "is killed"],
)
@pytest.mark.filterwarnings("error")
def test_an_incomplete_file_of_ffmpeg_is_never_returned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, words: list[str]
) -> None:
    fake_ffmpeg(tmp_path, script)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / "song.mp3"
    with pytest.raises(GenerationError) as caught:
        write_audio(sound(), RATE, path, TAGS)
    for word in ("output_format is mp3", *words):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None
    assert [*path.parent.iterdir()] == []


def test_the_systems_ffmpeg_is_preferred_and_the_bundled_one_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_ffmpeg(tmp_path, "exit 3")
    monkeypatch.setenv("PATH", str(tmp_path))
    write_audio(sound(), RATE, tmp_path / "song.mp3", TAGS)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(GenerationError, match="ffmpeg failed"):
        write_audio(sound(), RATE, tmp_path / "song.mp3", TAGS)


WITHOUT_IMAGEIO = """
import sys
from pathlib import Path
sys.modules["imageio_ffmpeg"] = None  # an import of it fails
import torch
from musicgen_svc.audio.writing import write_audio
write_audio(torch.zeros(1, 32_000), 32_000, Path(sys.argv[1]), {})
"""


def test_where_ffmpeg_is_installed_imageio_ffmpeg_is_not_needed(tmp_path: Path) -> None:
    (tmp_path / "ffmpeg").symlink_to(imageio_ffmpeg.get_ffmpeg_exe())
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_IMAGEIO, str(tmp_path / "song.mp3")]
    subprocess.run(command, check=True, env=os.environ | {"PATH": str(tmp_path)})
    assert decoded(tmp_path / "song.mp3")[0].shape == (1, 32_000)


@pytest.mark.parametrize("absent", ["package", "bundle", "program"])
def test_a_missing_ffmpeg_is_named_and_wav_still_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, absent: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    if absent == "program":
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/nowhere/ffmpeg")
    elif absent == "package":
        monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    else:
        monkeypatch.setattr("imageio_ffmpeg._utils._get_ffmpeg_exe", lambda: None)
    with pytest.raises(GenerationError, match="output_format is mp3 but ffmpeg was not found"):
        write_audio(sound(), RATE, tmp_path / "song.mp3", TAGS)
    write_audio(sound(), RATE, tmp_path / "song.wav", TAGS)
    assert [*tmp_path.iterdir()] == [tmp_path / "song.wav"]


FULL_DISK = """
import resource, sys, torch
from pathlib import Path
from musicgen_svc.errors import GenerationError
from musicgen_svc.audio.writing import write_audio

folder, endless = Path(sys.argv[1]), resource.RLIM_INFINITY
for case in sys.argv[2:]:
    kind, limit = case.split()
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), endless))
    try:
        write_audio(torch.zeros(1, 160_000), 32_000, folder / f"song.{kind}", {"title": "x" * 5000})
    except GenerationError as error:
        print(error)
    assert not [*folder.iterdir()], [*folder.iterdir()]
    resource.setrlimit(resource.RLIMIT_FSIZE, (endless, endless))
    write_audio(torch.zeros(1, 160_000), 32_000, folder / f"song.{kind}", {})
    (folder / f"song.{kind}").unlink()
"""


def test_a_full_disk_is_named_leaves_no_file_and_does_not_last(tmp_path: Path) -> None:
    """A limit of the file size simulates a full disk: in the header, in the samples, and in pydub's wav."""
    cases = ["wav 0", "wav 20", "wav 99999", "wav 320100", "mp3 0", "mp3 99999", "mp3 319000"]
    command = [sys.executable, "-W", "error", "-c", FULL_DISK, str(tmp_path), *cases]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for case, sentence in zip(cases, result.stdout.splitlines(), strict=True):
        assert f"output_format is {case[:3]} but the file could not be written" in sentence
        assert "disk may be full" in sentence
    assert result.stderr == ""


@pytest.mark.parametrize("kind", KINDS)
def test_a_raising_tick_ends_the_writing_at_once_and_leaves_nothing(tmp_path: Path, kind: str) -> None:
    samples = torch.from_numpy(noise(10, RATE, rms=0.1)).tile(60)
    raised_s: list[float] = []

    def stop(done: int, total: int) -> None:
        raised_s.append(time.monotonic())
        raise KeyboardInterrupt

    start_s = time.monotonic()
    write_audio(samples[:, : samples.shape[1] // 20], RATE, tmp_path / f"part.{kind}", TAGS)
    part_s = time.monotonic() - start_s
    (tmp_path / f"part.{kind}").unlink()
    threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        write_audio(samples, RATE, tmp_path / f"song.{kind}", TAGS, tick=stop)
    assert len(raised_s) == 1
    assert time.monotonic() - raised_s[0] < max(2, 10 * part_s), "about half the time of the whole file"
    assert [*tmp_path.iterdir()] == []
    assert threading.active_count() == threads


def test_importing_the_service_changes_nothing_in_pydub() -> None:
    check = """
import tempfile
import musicgen_svc.audio.writing
import pydub.audio_segment
assert pydub.audio_segment.NamedTemporaryFile is tempfile.NamedTemporaryFile
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", check], check=True)


def test_mp3s_that_are_written_at_once_do_not_mix(tmp_path: Path) -> None:
    def write(hz: int) -> None:
        write_audio(torch.from_numpy(tone(hz, 2, RATE)), RATE, tmp_path / f"{hz}.mp3", {"title": str(hz)})

    threads = [threading.Thread(target=write, args=(hz,)) for hz in (300, 500, 700)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for hz in (300, 500, 700):
        path = tmp_path / f"{hz}.mp3"
        assert loudest_hz(decoded(path)[0], RATE) == pytest.approx(hz, abs=1)
        assert read_tags(path) == {"title": str(hz)}


@pytest.mark.parametrize("bad", [[[1.5]], [[float("nan")]], [[-1.01]]])
def test_samples_out_of_range_fail_an_assertion(tmp_path: Path, bad: list[list[float]]) -> None:
    with pytest.raises(AssertionError):
        write_audio(torch.tensor(bad), RATE, tmp_path / "song.wav", {})
    assert [*tmp_path.iterdir()] == []
