"""The liveness probe tells a server that works from one that does not, whatever its HTTP status says."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from musicgen_svc.runtime.output_files import WorkFolder
from tests.cli.repository import ROOT


class Health(BaseHTTPRequestHandler):
    answer: Any = None

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(self.answer).encode())


def probe(port: int, work_dir: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "musicgen_svc.cli.probe"], cwd=ROOT,
        env=os.environ | {"PORT": str(port), "MUSICGEN_WORK_DIR": str(work_dir)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "runs", "words"),
    [
        ({"status": "STARTING"}, False, None),
        ({"status": "READY"}, False, None),
        ({"status": "BUSY"}, True, None),
        ({"status": "BUSY"}, False, "no request runs"),
        ({"status": "UNHEALTHY"}, True, "UNHEALTHY"),
        ({"status": "DEFUNCT"}, False, "DEFUNCT"),
        ({"status": "SETUP_FAILED"}, False, "SETUP_FAILED"),
        ("not Cog", False, "does not answer"),
    ],
)
def test_it_fails_where_the_server_does_not_serve(
    tmp_path: Path, answer: Any, runs: bool, words: str | None
) -> None:
    work = WorkFolder(tmp_path)
    if runs:
        work.new_request()
    with HTTPServer(("127.0.0.1", 0), type("Answer", (Health,), {"answer": answer})) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        ended = probe(server.server_port, tmp_path)
        thread.join()
    assert ended.returncode == (words is not None), ended
    assert (words or "") in ended.stderr and ended.stderr.count("\n") == (words is not None)
    work.remove()


def test_no_server_is_a_failure(tmp_path: Path) -> None:
    assert probe(1, tmp_path).stderr == "The server does not answer.\n"
