"""The preStop hook waits for the requests that run, and for nothing else."""

import subprocess
import threading
from pathlib import Path

import pytest

from musicgen_svc.runtime.output_files import WorkFolder
from tests.cli.test_probe import command, outcome, server


def hook(port: int, folder: Path, grace_s: str = "600") -> "subprocess.Popen[str]":
    """Starts the hook, and returns when it has made its file."""
    file = folder / "drain"
    started = command(
        port, folder, "musicgen_svc.cli.drain",
        MUSICGEN_DRAIN_FILE=str(file), MUSICGEN_DRAIN_GRACE_S=grace_s,
    )  # fmt: skip
    while not file.exists() and started.poll() is None:
        threading.Event().wait(0.01)
    assert file.exists(), started.communicate()
    return started


def test_it_ends_when_no_request_runs(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path)
    first, second = work.new_request(), work.new_request()
    with server({"status": "READY"}) as port:
        waiting = hook(port, tmp_path)
        work.release(first)
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(2.0)
        work.release(second, 600)  # its output is kept, but Cog has it
        assert outcome(waiting) == (0, "")


def test_it_ends_when_the_grace_is_over(tmp_path: Path) -> None:
    WorkFolder(tmp_path).new_request()
    with server({"status": "READY"}) as port:
        waiting = hook(port, tmp_path, grace_s="0.5")
        assert outcome(waiting) == (1, "Requests still run after MUSICGEN_DRAIN_GRACE_S.\n")


@pytest.mark.parametrize("status", ["UNHEALTHY", "DEFUNCT", "SETUP_FAILED"])
def test_it_does_not_wait_for_a_server_that_no_longer_works(tmp_path: Path, status: str) -> None:
    WorkFolder(tmp_path).new_request()
    with server({"status": status}) as port:
        assert outcome(hook(port, tmp_path)) == (0, "")


def test_without_a_file_it_says_which_setting_is_missing(tmp_path: Path) -> None:
    started = command(1, tmp_path, "musicgen_svc.cli.drain", MUSICGEN_DRAIN_FILE="")
    status, printed = outcome(started)
    assert status == 1 and "MUSICGEN_DRAIN_FILE is not set" in printed
