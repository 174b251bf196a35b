"""A server that is told to stop answers what runs, refuses the rest with a sentence, and ends with 0."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
from bodies import SHORT
from processes import needs_proc, processes_with, wait_for
from replies import output, sentence
from server import ROOT, BareCog, CogServer

from musicgen_svc.errors import DrainingError

pytestmark = needs_proc


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    """The folder of the server's temporary files."""
    (tmp_path / "temporary").mkdir()
    return tmp_path / "temporary"


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """The file whose existence ends the request `until(release)`."""
    return tmp_path / "release"


def until(release: Path) -> dict[str, str]:
    """Inputs for the toy: a request that runs until this file exists."""
    return {"prompt": f"until {release}"}


def begun(folder: Path) -> None:
    """Waits until the toy runs a request in this temporary folder."""
    wait_for(lambda: list(folder.rglob("half-written")))


def test_what_runs_is_answered_and_what_is_new_is_refused(
    checkout: Path, temporary: Path, release: Path
) -> None:
    with CogServer(
        root=checkout, TMPDIR=str(temporary), COG_MAX_CONCURRENCY="2", MUSICGEN_DRAIN_GRACE_S="600"
    ) as server:
        running = server.submit(until(release), id="begun")
        begun(temporary)
        server.process.send_signal(signal.SIGTERM)
        wait_for(
            lambda: "Stopping when the predictions that run (1) have ended, or after 600 s" in server.log
        )
        for method, path in (("POST", "/predictions"), ("PUT", "/predictions/another")):
            refused = server.request(method, path, {"input": {"prompt": "new"}})
            assert (refused.status_code, refused.json()) == (503, {"error": str(DrainingError())})
        state = server.state("begun")
        assert state and state["status"] == "processing", "a client may still ask how its prediction is"
        release.touch()
        assert output(running.result(60)) == b"RIFF" + until(release)["prompt"].encode()
        assert server.process.wait(60) == 0
        assert processes_with(str(temporary)) == []
        assert list(temporary.iterdir()) == []


def test_what_runs_beyond_the_grace_is_cut(checkout: Path, temporary: Path, release: Path) -> None:
    with CogServer(root=checkout, TMPDIR=str(temporary), MUSICGEN_DRAIN_GRACE_S="0.5") as server:
        running = server.submit(until(release), id="begun")
        begun(temporary)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        with pytest.raises(requests.ConnectionError):
            running.result(60)
        assert list(temporary.iterdir()) == []


class Webhook(BaseHTTPRequestHandler):
    """Keeps what it receives. It is busy at first, so that Cog sends its message again 0.2 s later."""

    received: list[dict[str, Any]]

    def log_message(self, *_: object) -> None: ...

    def do_POST(self) -> None:
        self.received.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(503 if len(self.received) == 1 else 200)
        self.end_headers()


def test_the_webhook_of_what_ran_is_sent(checkout: Path, temporary: Path, release: Path) -> None:
    received: list[dict[str, Any]] = []
    with (
        HTTPServer(("127.0.0.1", 0), type("Kept", (Webhook,), {"received": received})) as receiver,
        CogServer(root=checkout, TMPDIR=str(temporary), MUSICGEN_DRAIN_GRACE_S="600") as server,
    ):
        threading.Thread(target=receiver.serve_forever, daemon=True).start()
        body = {
            "input": until(release),
            "webhook": f"http://127.0.0.1:{receiver.server_port}",
            "webhook_events_filter": ["completed"],
        }
        answer = server.request("POST", "/predictions", body, headers={"Prefer": "respond-async"})
        assert answer.status_code == 202
        begun(temporary)
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: "Stopping" in server.log)
        release.touch()
        assert server.process.wait(60) == 0
        receiver.shutdown()
    assert [told["status"] for told in received] == ["succeeded", "succeeded"]


@pytest.fixture
def settings(weights: Path, temporary: Path) -> dict[str, str]:
    """Settings of the real service, with one slot and room for others to wait."""
    return {
        "COG_WEIGHTS": str(weights / "small"), "MUSICGEN_WEIGHTS_DIR": str(weights), "OMP_NUM_THREADS": "1",
        "TMPDIR": str(temporary), "MUSICGEN_SLOTS": "1", "COG_MAX_CONCURRENCY": "6",
        "MUSICGEN_DRAIN_GRACE_S": "600",
    }  # fmt: skip


def begin_one_and_let_three_wait(server: CogServer) -> list["Future[dict[str, Any]]"]:
    """Starts four requests for one slot. Returns when three of them wait."""

    def logs(words: str, id: str) -> None:
        wait_for(lambda: words in (server.state(id) or {"logs": ""})["logs"])

    answers = [server.submit(SHORT | {"duration": 60}, "running")]
    logs("generate", "running")
    for id in ("first", "second", "third"):
        answers.append(server.submit(SHORT, id))
        logs("before this one", id)
    return answers


def test_requests_that_wait_for_a_slot_are_told_to_go_elsewhere(settings: dict[str, str]) -> None:
    with CogServer(**settings) as server:
        running, *waiting = begin_one_and_let_three_wait(server)
        server.process.send_signal(signal.SIGTERM)
        for answer in waiting:
            assert sentence(answer.result(60)).endswith(str(DrainingError()))
        assert not running.done(), "the three did not wait for its end"
        assert len(output(running.result(120))) > 60 * 32_000
        assert server.process.wait(60) == 0


def test_in_an_image_the_hook_drains(settings: dict[str, str], temporary: Path) -> None:
    drain_file = temporary / "drain"
    drain_file.touch()  # left by the container before
    settings["MUSICGEN_DRAIN_FILE"] = str(drain_file)
    with BareCog(**settings) as server:
        running, *waiting = begin_one_and_let_three_wait(server)
        environment = os.environ | settings | {"PORT": server.url.rpartition(":")[2]}
        with subprocess.Popen(
            [sys.executable, "-m", "musicgen_svc.cli.drain"], cwd=ROOT, env=environment
        ) as hook:
            for answer in waiting:
                assert sentence(answer.result(60)).endswith(str(DrainingError()))
            assert sentence(server.predict(SHORT)).endswith(str(DrainingError()))
            assert hook.poll() is None and not running.done()
            assert len(output(running.result(120))) > 60 * 32_000
            assert hook.wait(60) == 0
        assert server.stop() == 0


def test_a_client_that_does_not_read_its_answer_does_not_keep_the_server_from_ending(
    checkout: Path, temporary: Path, release: Path
) -> None:
    with CogServer(root=checkout, TMPDIR=str(temporary), MUSICGEN_DRAIN_GRACE_S="600") as server:
        address = urlsplit(server.url)
        large = "data:audio/wav;base64," + "UklG" * 2**20  # more than the buffers of the connections hold
        body = json.dumps({"input": until(release) | {"input_audio": large}}).encode()
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect((address.hostname or "", address.port or 0))
            head = "POST /predictions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            begun(temporary)
            server.process.send_signal(signal.SIGTERM)
            wait_for(lambda: "Stopping" in server.log)
            release.touch()
            assert server.process.wait(60) == 0
