"""`scripts/predict` as a command: what it prints, what it writes, and its exit status."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from musicgen_svc.cli import predict as predict_module
from musicgen_svc.cli.terminal import Progress
from tests.cli.fake_cog import WAV, FakeCog
from tests.cli.repository import ROOT


def command(cwd: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Runs the command in a folder."""
    return subprocess.run(
        [sys.executable, "-m", "musicgen_svc.cli.predict", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_prediction_prints_its_path_seed_and_times(cog: FakeCog, tmp_path: Path) -> None:
    metrics = {
        "seed": 7,
        "audio_seconds": 8.0,
        "steps": 403,
        "load": 0.0,
        "generate": 12.345,
        "predict_time": 13.0,
    }
    cog.outcome = lambda id, values: (200, {"status": "succeeded", "output": WAV, "metrics": metrics})
    ended = command(tmp_path, "--url", cog.url, "-i", "prompt=a waltz", "-i", "duration=8", "-o", "song.wav")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == [
        "song.wav",
        "  8.00 s of audio, seed 7, 403 steps",
        "  load 0.00 s, generate 12.35 s",
    ]
    assert "100%" in ended.stderr
    assert (tmp_path / "song.wav").read_bytes() == b"RIFF...."
    assert cog.started == [{"prompt": "a waltz", "duration": 8}]


def test_a_failed_prediction_is_its_sentence_and_status_1(cog: FakeCog, tmp_path: Path) -> None:
    cog.outcome = lambda id, values: (
        200,
        {"status": "failed", "error": "Prediction failed: InputError: prompt is bad; no."},
    )
    ended = command(tmp_path, "--url", cog.url, "-i", "prompt=bad")
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == "prompt is bad; no."
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_a_prediction_that_fails_at_once_is_told_without_empty_lines(cog: FakeCog, tmp_path: Path) -> None:
    cog.outcome = lambda id, values: (
        200,
        {"status": "failed", "error": "Prediction failed: InputError: it is bad."},
    )
    assert command(tmp_path, "--url", cog.url, "-i", "prompt=bad").stderr == "it is bad.\n"


@pytest.mark.parametrize("name", ["-", "/dev/stdout"])
def test_audio_on_standard_output_is_alone_there(cog: FakeCog, tmp_path: Path, name: str) -> None:
    metrics = {"seed": 7, "audio_seconds": 8.0}
    cog.outcome = lambda id, values: (200, {"status": "succeeded", "output": WAV, "metrics": metrics})
    ended = command(tmp_path, "--url", cog.url, "-i", "prompt=x", "-o", name)
    assert (ended.returncode, ended.stdout) == (0, "RIFF....")
    assert ended.stderr.endswith("  8.00 s of audio, seed 7\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [("-", "The output cannot be written to standard output: "), ("a.wav", "a.wav is written, but standard")],
)
def test_a_reader_that_is_gone_is_one_sentence(cog: FakeCog, tmp_path: Path, name: str, words: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    arguments = ["--url", cog.url, "-i", "prompt=x", "-o", name]
    with open(writer, "wb") as out:  # noqa: PTH123 (a descriptor, not a path)
        ended = subprocess.run(
            [sys.executable, "-m", "musicgen_svc.cli.predict", *arguments], cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=out, stderr=subprocess.PIPE, text=True,
            timeout=60,
        )  # fmt: skip
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith(words)
    assert "Traceback" not in ended.stderr and "Exception ignored" not in ended.stderr


def test_a_name_that_is_no_text_is_printed_as_it_is(cog: FakeCog, tmp_path: Path) -> None:
    arguments = ["--url", cog.url, "-i", "prompt=x", "-o", b"caf\xe9"]
    shown = subprocess.run(
        [sys.executable, "-m", "musicgen_svc.cli.predict", *arguments], cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8:strict"},
        capture_output=True, timeout=60,
    )  # fmt: skip
    assert (shown.returncode, shown.stdout.splitlines()[0]) == (0, b"caf\xe9"), shown.stderr


def test_progress_without_a_terminal_is_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress() as progress:
        for percent, stage in [(0, ""), (5, "load"), (6, "generate"), (6, "generate"), (100, "done")]:
            progress.show(percent, stage)
    assert capsys.readouterr().err.splitlines() == ["load        5%", "done      100%"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-i", "promt=a waltz"], "There is no input 'promt'"),
        (["-i", "input_audio=clip.wav"], "input_audio is 'clip.wav'"),
        ([], 'prompt and input_audio are both missing: give at least one of them. Try -i prompt="'),
        (["-i", "prompt= "], "prompt and input_audio are both missing"),
        (["-i", "prompt=" + "x" * 2001], "prompt has 2001 characters; at most 2000 are accepted."),
        (["-i", "prompt=x", "-i", "duration=0"], "duration is '0'; it must be a whole number from 1 to 600."),
        (["-i", "prompt=x", "-i", "duration=9"], "duration is 9; it must be between 1 and 8."),
        (["-i", "prompt=x", "-i", "continuation=true"], "continuation is true but input_audio is missing"),
        (["-i", "model_version=encode-decode"], "model_version 'encode-decode' needs input_audio"),
        (["-i", b"prompt=caf\xe9"], "prompt: the value is not UTF-8 text"),
        (["-i", "prompt=x", "--url", "127.0.0.1:5791"], "--url 127.0.0.1:5791: a server's URL begins with"),
        (["-i", "prompt=x", "-o", "nowhere/x.wav"], "-o nowhere/x.wav: there is no folder"),
    ],
)
def test_a_wrong_command_line_is_status_2_and_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    arguments: list[str | bytes], words: str,
) -> None:  # fmt: skip
    def started(*_: object, **__: object) -> None:
        raise AssertionError("a server was started")

    monkeypatch.setattr(subprocess, "Popen", started)
    monkeypatch.setattr(sys, "argv", ["scripts/predict", *map(os.fsdecode, arguments)])
    monkeypatch.setattr(predict_module.signal, "signal", lambda *_: None)
    monkeypatch.setenv("MUSICGEN_MAX_DURATION_S", "8")
    monkeypatch.chdir(tmp_path)
    assert predict_module.main() == 2
    err = capfd.readouterr().err
    assert err.startswith(words) and err.count("\n") == 1


def test_another_services_inputs_are_not_judged_by_our_rules(cog: FakeCog, tmp_path: Path) -> None:
    cog.schema = {"components": {"schemas": {"Input": {"properties": {"text": {"type": "string"}}}}}}
    ended = command(tmp_path, "--url", cog.url, "-i", "text=hello")
    assert ended.returncode == 0, ended.stderr
    assert cog.started == [{"text": "hello"}]


def test_help_fits_80_columns(tmp_path: Path) -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "musicgen_svc.cli.predict", "--help"], cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"},
        capture_output=True, text=True, check=True, timeout=60,
    ).stdout  # fmt: skip
    assert max(map(len, shown.splitlines())) < 80
    assert "  seed: a whole number from -1 to 4294967295\n" in shown
