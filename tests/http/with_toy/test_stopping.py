"""A server that is told to stop answers what runs, refuses the rest with a sentence, and ends with 0."""

import json
import signal
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
from processes import LIMIT_S, needs_proc, processes_with, wait_for
from replies import output
from server import CogServer

from musicgen_svc.errors import DrainingError

pytestmark = needs_proc


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
        assert output(running.result(LIMIT_S)) == b"RIFF" + until(release)["prompt"].encode()
        assert server.process.wait(LIMIT_S) == 0
        assert processes_with(str(temporary)) == []
        assert list(temporary.iterdir()) == []


def test_what_runs_beyond_the_grace_is_cut(checkout: Path, temporary: Path, release: Path) -> None:
    with CogServer(root=checkout, TMPDIR=str(temporary), MUSICGEN_DRAIN_GRACE_S="0.5") as server:
        running = server.submit(until(release), id="begun")
        begun(temporary)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(LIMIT_S) == 0
        with pytest.raises(requests.ConnectionError):
            running.result(LIMIT_S)
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
        assert server.process.wait(LIMIT_S) == 0
        receiver.shutdown()
    assert [told["status"] for told in received] == ["succeeded", "succeeded"]


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
            assert server.process.wait(LIMIT_S) == 0
