"""scripts/predict with a real Cog server and a toy service."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import LIMIT_S, needs_proc, processes_with, wait_for
from server import CogServer


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    """A folder for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    return folder


def start(checkout: Path, cwd: Path, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
    """Starts scripts/predict."""
    own = {name: value for name, value in os.environ.items() if name != "COG_WEIGHTS"}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "musicgen_svc.cli.predict", *arguments],
        cwd=cwd,
        env={**own, "PYTHONPATH": str(checkout), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@needs_proc
def test_one_command_starts_a_server_and_leaves_a_file_and_nothing_else(
    checkout: Path, tmp_path: Path, temporary: Path
) -> None:
    (tmp_path / "clip.mp3").write_bytes(b"ID3 of the user's")
    (tmp_path / "json.py").write_text("raise ImportError('a file of the user is no module')")
    process = start(
        checkout,
        tmp_path,
        "-i",
        "prompt=x",
        "-i",
        "input_audio=@clip.mp3",
        "-i",
        "seed=0",
        TMPDIR=str(temporary),
    )
    out, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, err
    assert out == "output.wav\n  8.00 s of audio, seed 0\n  load 0.50 s, generate 1.25 s\n"
    assert (tmp_path / "output.wav").read_bytes() == b"ID3 of the user's"
    assert "100%" in err
    assert processes_with(str(temporary)) == []
    assert list(temporary.iterdir()) == []


def test_a_failed_set_up_is_its_sentence_and_status_1(checkout: Path, tmp_path: Path) -> None:
    process = start(checkout, tmp_path, "-i", "prompt=x", COG_WEIGHTS="broken")
    out, err = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, out) == (1, "")
    assert err.splitlines()[-1] == "Setup failed: COG_WEIGHTS is 'broken', where there is no state_dict.bin."


def test_the_log_is_kept_where_it_alone_holds_the_cause(
    checkout: Path, tmp_path: Path, temporary: Path
) -> None:
    process = start(checkout, tmp_path, "-i", "prompt=crash", TMPDIR=str(temporary))
    _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1
    said, named = err.splitlines()[-2:]
    assert said == "Worker crashed"
    log = Path(named.removeprefix("The server's log: "))
    assert log.parent.parent == temporary
    assert "prediction" in log.read_text().lower()

    process = start(checkout, tmp_path, "-i", "prompt=refused", TMPDIR=str(temporary))
    _, err = process.communicate(timeout=LIMIT_S)
    assert err.splitlines()[-1] == "prompt is 'refused'; it must be another."
    assert [path.name for path in temporary.iterdir()] == [log.parent.name]


def test_a_server_that_runs_is_used_and_left_running(checkout: Path, tmp_path: Path) -> None:
    with CogServer(root=checkout) as server:
        process = start(checkout, tmp_path, "--url", server.url, "-i", "prompt=refused")
        out, err = process.communicate(timeout=LIMIT_S)
        assert (process.returncode, out) == (1, "")
        assert err.splitlines()[-1] == "prompt is 'refused'; it must be another."
        process = start(checkout, tmp_path, "--url", server.url, "-i", "duration=601")
        out, err = process.communicate(timeout=LIMIT_S)
        assert (process.returncode, out) == (2, "")
        assert err == "duration is '601'; it must be a whole number from 1 to 600.\n"
        process = start(checkout, tmp_path, "--url", server.url, "-i", "prompt=crash")
        out, err = process.communicate(timeout=LIMIT_S)
        assert (process.returncode, out) == (1, "")
        assert err.splitlines()[-1] == "Worker crashed"
        assert server.health()["status"] == "UNHEALTHY"


def test_a_server_whose_device_is_lost_says_that_it_is_unhealthy(checkout: Path) -> None:
    with CogServer(root=checkout) as server:
        assert server.health()["status"] == "READY"
        assert server.predict({"prompt": "device lost"})["status"] == "failed"
        assert server.health()["status"] == "UNHEALTHY"


@needs_proc
def test_progress_is_shown_and_ctrl_c_ends_everything(
    checkout: Path, tmp_path: Path, temporary: Path
) -> None:
    process = start(checkout, tmp_path, "-i", "prompt=slow", TMPDIR=str(temporary))
    assert process.stderr
    shown = ""
    while "generate" not in shown:
        assert process.poll() is None, shown
        shown += process.stderr.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "Interrupted."
    assert sorted(path.name for path in tmp_path.iterdir()) == ["temporary"]
    assert processes_with(str(temporary)) == []
    assert list(temporary.iterdir()) == []


@needs_proc
def test_a_killed_command_leaves_no_server(checkout: Path, tmp_path: Path, temporary: Path) -> None:
    process = start(checkout, tmp_path, "-i", "prompt=slow", TMPDIR=str(temporary))
    wait_for(lambda: list(temporary.rglob("half-written")))
    process.kill()
    process.communicate(timeout=LIMIT_S)
    wait_for(lambda: not processes_with(str(temporary)))
