"""The probes tell a server that works from one that does not, whatever its HTTP status says."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from musicgen_svc.cli.probe import fault
from musicgen_svc.runtime.output_files import WorkFolder
from tests.cli.repository import ROOT


class Health(BaseHTTPRequestHandler):
    answer: Any = None

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(self.answer).encode())


@contextmanager
def server(answer: Any) -> Iterator[int]:
    """Context manager: a server with this health. Yields its port."""
    with HTTPServer(("127.0.0.1", 0), type("Answer", (Health,), {"answer": answer})) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running.server_port
        running.shutdown()
        thread.join()


def command(port: int, work_dir: Path, *arguments: str, **variables: str) -> "subprocess.Popen[str]":
    """Starts a command of the package."""
    return subprocess.Popen(
        [sys.executable, "-m", *arguments], cwd=ROOT,
        env=os.environ | {"PORT": str(port), "MUSICGEN_WORK_DIR": str(work_dir), **variables},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def outcome(started: "subprocess.Popen[str]") -> tuple[int, str]:
    """Waits until a command has ended. Returns its exit status and what it has printed."""
    printed, error = started.communicate(timeout=60)
    return started.returncode, printed + error


def probe(port: int, work_dir: Path, *question: str, **variables: str) -> tuple[int, str]:
    """Runs a probe. Returns its exit status and what it prints."""
    return outcome(command(port, work_dir, "musicgen_svc.cli.probe", *question, **variables))


@pytest.mark.parametrize(
    ("status", "started", "ready", "alive"),
    [
        ("UNKNOWN", "being set up", "being set up", None),
        ("STARTING", "being set up", "being set up", None),
        ("READY", None, None, None),
        ("BUSY", None, "COG_MAX_CONCURRENCY", None),
        ("UNHEALTHY", "UNHEALTHY", "UNHEALTHY", "UNHEALTHY"),
        ("DEFUNCT", "DEFUNCT", "DEFUNCT", "DEFUNCT"),
        ("SETUP_FAILED", "SETUP_FAILED", "SETUP_FAILED", "SETUP_FAILED"),
        (None, "does not answer", "does not answer", "does not answer"),
    ],
)
def test_each_probe_knows_every_state_of_cogs(
    tmp_path: Path, status: str | None, started: str | None, ready: str | None, alive: str | None
) -> None:
    WorkFolder(tmp_path).new_request()
    health = None if status is None else {"status": status}
    for question, words in (("started", started), ("ready", ready), ("alive", alive)):
        reason = fault(question, health, tmp_path, tmp_path / "drain")
        assert (reason is None) == (words is None) and (words or "") in (reason or ""), question


def test_a_busy_server_in_which_no_request_runs_is_not_alive(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path)
    assert "no request runs" in str(fault("alive", {"status": "BUSY"}, tmp_path))
    ended, running = work.new_request(), work.new_request()
    work.release(ended, 600)
    assert fault("alive", {"status": "BUSY"}, tmp_path) is None
    work.release(running, 600)
    assert "no request runs" in str(fault("alive", {"status": "BUSY"}, tmp_path))


def test_a_server_that_is_drained_is_alive_and_not_ready(tmp_path: Path) -> None:
    with server({"status": "READY"}) as port:
        file = {"MUSICGEN_DRAIN_FILE": str(tmp_path / "drain")}
        assert probe(port, tmp_path, "ready", **file) == (0, "")
        (tmp_path / "drain").touch()
        assert probe(port, tmp_path, "ready", **file) == (1, "The server is shutting down.\n")
        assert probe(port, tmp_path, **file) == (0, "")


def test_no_server_and_no_cog_are_failures(tmp_path: Path) -> None:
    assert probe(1, tmp_path) == (1, "The server does not answer.\n")
    with server("not Cog") as port:
        assert probe(port, tmp_path, "started") == (1, "The server does not answer.\n")


def test_a_wrong_setting_is_one_sentence(tmp_path: Path) -> None:
    status, printed = probe(1, tmp_path, MUSICGEN_MAX_DURATION_S="ten")
    assert status == 1 and printed == "MUSICGEN_MAX_DURATION_S is 'ten'; it must be a number.\n"
