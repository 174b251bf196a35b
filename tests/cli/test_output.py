"""The output of a prediction: how it is fetched, and where and how it is written."""

import os
from pathlib import Path

import pytest

from musicgen_svc.cli import output as output_module
from musicgen_svc.cli.client import FailedError
from musicgen_svc.cli.inputs import UsageError, request_input
from tests.cli.fake_cog import WAV, FakeCog
from tests.cli.repository import SCHEMA


def test_the_suffix_is_that_of_what_came_back(cog: FakeCog) -> None:
    assert output_module.fetch(WAV) == (b"RIFF....", ".wav")
    assert output_module.fetch("data:audio/mpeg;base64,SUQz") == (b"ID3", ".mp3")
    assert output_module.fetch("data:audio/flac,a%20b") == (b"a b", ".flac")
    assert output_module.fetch(f"{cog.url}/uploaded/song.mp3") == (b"ID3 uploaded", ".mp3")


@pytest.mark.parametrize("output", ["data:audio/wav;base64,A", "/uploaded/gone.mp3", "ftp://example.org/x"])
def test_an_output_that_cannot_be_had_is_one_sentence(cog: FakeCog, output: str) -> None:
    with pytest.raises(FailedError, match="output"):
        output_module.fetch(cog.url + output if output.startswith("/") else output)


def test_without_a_name_no_file_is_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("output.wav").write_bytes(b"mine")
    saved = [str(output_module.save(b"new", ".wav", None)) for _ in range(2)]
    assert saved == ["output-1.wav", "output-2.wav"]
    assert str(output_module.save(b"new", ".mp3", None)) == "output.mp3"
    assert Path("output.wav").read_bytes() == b"mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "output-1.wav", "output-2.wav", "output.mp3", "output.wav",
    ]  # fmt: skip


def test_a_named_file_is_replaced_at_once_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "song.wav"
    path.write_bytes(b"old")
    with monkeypatch.context() as broken:

        def full(self: Path, data: bytes) -> int:
            self.touch()
            raise OSError(28, "No space left on device", str(path))

        broken.setattr(Path, "write_bytes", full)
        with pytest.raises(FailedError, match="No space left on device"):
            output_module.save(b"new", ".wav", path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    output_module.save(b"new", ".wav", path)
    assert path.read_bytes() == b"new"


def test_a_link_is_followed_and_a_pipe_or_device_is_written_to(tmp_path: Path) -> None:
    """`-o /dev/null`, as root: it must be there afterwards."""
    target = tmp_path / "elsewhere" / "song.wav"
    target.parent.mkdir()
    target.write_bytes(b"old")
    (tmp_path / "link.wav").symlink_to(target)
    assert (
        output_module.save(b"new", ".wav", output_module.checked_output(tmp_path / "link.wav"))
        == tmp_path / "link.wav"
    )
    assert target.read_bytes() == b"new" and (tmp_path / "link.wav").is_symlink()

    os.mkfifo(tmp_path / "pipe")
    end = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    output_module.save(b"new", ".wav", output_module.checked_output(tmp_path / "pipe"))
    assert os.read(end, 10) == b"new" and (tmp_path / "pipe").is_fifo()
    os.close(end)


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert output_module.checked_output(None) is None
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UsageError, match="name a file elsewhere with -o"):
        output_module.checked_output(None)
    with pytest.raises(UsageError, match=r"^-o song\.wav: .* cannot be written to"):
        output_module.checked_output(Path("song.wav"))


def test_a_tilde_of_nobody_is_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("~nobody-here.wav").write_bytes(b"RIFF")
    assert request_input(["input_audio=@~nobody-here.wav"], SCHEMA)["input_audio"].startswith("data:audio/")
    assert output_module.checked_output(Path("~nobody-here.wav")) == Path("~nobody-here.wav")


@pytest.mark.parametrize("name", [".", "nowhere/song.wav"])
def test_an_impossible_output_is_refused_before_the_work(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"^-o "):
        output_module.checked_output(tmp_path / name)
