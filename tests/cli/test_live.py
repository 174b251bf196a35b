"""Players of live audio: which one is used, what it is given, and what happens when it fails."""

import base64
import io
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from musicgen_svc.cli.client import FailedError
from musicgen_svc.cli.inputs import UsageError
from musicgen_svc.cli.live import Chunk, GrowingWav, installed_player, playing

SAMPLES = (np.sin(np.arange(2000) / 9) * 20_000).astype("<i2").reshape(-1, 2)


def chunks() -> list[Chunk]:
    """The samples in chunks of two channels."""
    parts = np.split(SAMPLES, [100, 450])
    return [
        {"index": i, "sample_rate": 8000, "channels": 2, "pcm": base64.b64encode(part.tobytes()).decode()}
        for i, part in enumerate(parts)
    ]


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the whole PATH."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def install(folder: Path, name: str, body: str) -> None:
    """Makes a program of Python text. `out` is a file that it may append to."""
    path = folder / name
    out = folder.parent / f"{name}.out"
    path.write_text(f"#!{sys.executable}\nimport sys, time\nout = open({str(out)!r}, 'ab')\n{body}")
    path.chmod(0o755)


COPY = "out.write(sys.stdin.buffer.read())"
COPY_FILE = "out.write(open(sys.argv[1], 'rb').read()); out.write(b'|end of a file|')"


def test_the_first_installed_player_is_used(programs: Path) -> None:
    with pytest.raises(UsageError, match="needs ffplay, aplay or afplay"):
        installed_player()
    for name in ("afplay", "aplay", "ffplay"):
        install(programs, name, "")
        assert installed_player()[0] == name


@pytest.mark.parametrize("name", ["ffplay", "aplay"])
def test_a_player_gets_all_chunks_as_one_wav(programs: Path, name: str) -> None:
    install(programs, name, COPY)
    with playing(installed_player()) as player:
        for chunk in chunks():
            player.add(chunk)
        player.finish()
    samples, rate = soundfile.read(io.BytesIO((programs.parent / f"{name}.out").read_bytes()), dtype="int16")
    assert rate == 8000 and np.array_equal(samples, SAMPLES)


def test_afplay_gets_whole_files_one_after_the_other(programs: Path) -> None:
    install(programs, "afplay", COPY_FILE)
    with playing(installed_player()) as player:
        for chunk in chunks():
            player.add(chunk)
        player.finish()
    *files, rest = (programs.parent / "afplay.out").read_bytes().split(b"|end of a file|")
    assert files and not rest
    played = [soundfile.read(io.BytesIO(content), dtype="int16")[0] for content in files]
    assert np.array_equal(np.concatenate(played), SAMPLES)


def test_a_player_that_fails_is_named_and_the_rest_goes_on(
    programs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(programs, "aplay", "sys.exit(3)")
    with playing(installed_player()) as player:
        for chunk in chunks() * 50:
            player.add(chunk)
        player.finish()
    assert capsys.readouterr().err == "aplay cannot play: it ended with status 3.\n"


def test_an_interrupt_ends_a_player_that_plays(programs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(programs, "ffplay", "out.write(sys.stdin.buffer.read(44)); out.flush(); time.sleep(300)")
    begun = programs.parent / "ffplay.out"
    with pytest.raises(KeyboardInterrupt), playing(installed_player()) as player:
        player.add(chunks()[0])
        while not (begun.exists() and begun.stat().st_size):
            time.sleep(0.01)
        raise KeyboardInterrupt
    assert player._process is not None and player._process.poll() is not None
    assert capsys.readouterr().err == ""


def test_a_growing_wav_is_readable_at_any_time() -> None:
    stream = io.BytesIO()
    wav = GrowingWav(stream)
    for chunk, length in zip(chunks(), (100, 450, 1000), strict=True):
        wav.add(chunk)
        samples, rate = soundfile.read(io.BytesIO(stream.getvalue()), dtype="int16")
        assert rate == 8000 and np.array_equal(samples, SAMPLES[:length])


def test_a_closed_pipe_is_one_sentence() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb", buffering=0) as stream, pytest.raises(FailedError, match="cannot be written"):
        GrowingWav(stream).add(chunks()[0])
