"""What docs/http.md says about Cog. If one of these tests fails, Cog has changed, and the document must too.

None of this is decided by the service.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from processes import wait_for
from replies import data_uri
from server import ROOT, CogServer


class Receiver(BaseHTTPRequestHandler):
    """Accepts every request and keeps it in the server's list `received`."""

    def _take(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.server.received.append((self.command, self.path, dict(self.headers), body))  # type: ignore[attr-defined]
        self.send_response(200)
        self.end_headers()

    do_POST = do_PUT = _take

    def log_message(self, *_: object) -> None: ...


@contextmanager
def receiver() -> Iterator[ThreadingHTTPServer]:
    """Context manager: a server for webhooks and uploads."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        server.received = []  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_the_version_is_the_one_that_readme_speaks_of() -> None:
    assert f"Cog {version('cog')}" in (ROOT / "docs" / "http.md").read_text()


@pytest.mark.parametrize(("body", "status"), [(b"{", 400), (b'{"input": 1', 400), (b'{"webhook": 1}', 422)])
def test_a_body_that_is_no_request_is_answered_in_plain_text(
    toy_server: CogServer, body: bytes, status: int
) -> None:
    headers = {"Content-Type": "application/json"}
    answer = toy_server.request("POST", "/predictions", data=body, headers=headers)
    assert answer.status_code == status
    assert answer.headers["content-type"].startswith("text/plain")


def test_the_root_names_a_page_that_is_not_there(toy_server: CogServer) -> None:
    root = toy_server.request("GET", "/").json()
    assert root["docs_url"] == "/docs"
    assert toy_server.request("GET", "/docs").status_code == 404


def test_a_webhook_s_start_says_processing_and_a_prefix_for_outputs_is_ignored(toy_server: CogServer) -> None:
    with receiver() as hook:
        url = f"http://127.0.0.1:{hook.server_port}/hook"
        body: dict[str, Any] = {"input": {"prompt": "x"}, "webhook": url, "output_file_prefix": f"{url}/"}
        answer = toy_server.request("POST", "/predictions", body).json()
        assert answer["output"].startswith("data:")
        received: list[Any] = hook.received  # type: ignore[attr-defined]
        # The events come in any order. The first one would have the status `starting` by Cog's documentation.
        wait_for(lambda: {json.loads(body)["status"] for *_, body in received} == {"processing", "succeeded"})
    assert not any(method == "PUT" for method, *_ in received)


def test_an_upload_is_a_plain_put_and_no_form(checkout: Path) -> None:
    with receiver() as store:
        url = f"http://127.0.0.1:{store.server_port}/store/"
        with CogServer("--upload-url", url, root=checkout) as server:
            output = server.predict({"prompt": "x"})["output"]
        ((method, path, headers, body),) = store.received  # type: ignore[attr-defined]
    assert method == "PUT" and output.endswith(path)
    assert body == b"RIFFx" and "multipart" not in {k.lower(): v for k, v in headers.items()}["content-type"]


def test_bad_base64_is_cogs_to_refuse_or_to_make_empty(toy_server: CogServer) -> None:
    empty = toy_server.predict({"prompt": "x", "input_audio": "data:audio/wav;base64,"})
    assert empty["code"] == 200
    upper = toy_server.predict({"prompt": "x", "input_audio": data_uri(b"RIFF").replace("data:", "DATA:")})
    assert upper["code"] == 200, "Cog hands it on as a string"
