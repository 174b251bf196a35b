"""What README tells of Cog, as Cog does it. A test that fails here means that Cog changed, and README must.

Nothing here is a fault of the service, and nothing of it can be mended in the service.
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
import toy
from replies import data_uri
from server import CogServer
from toy import wait_for


class Receiver(BaseHTTPRequestHandler):
    """Takes in whatever is sent to it."""

    def _take(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.server.received.append((self.command, self.path, dict(self.headers), body))  # type: ignore[attr-defined]
        self.send_response(200)
        self.end_headers()

    do_POST = do_PUT = _take

    def log_message(self, *_: object) -> None: ...


@contextmanager
def receiver() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        server.received = []  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.checkout(tmp_path_factory.mktemp("quirks"))


@pytest.fixture(scope="module")
def server(checkout: Path) -> Iterator[CogServer]:
    with CogServer(root=checkout) as running:
        yield running


def test_the_version_is_the_one_that_readme_speaks_of() -> None:
    assert f"Cog {version('cog')}" in (toy.ROOT / "docs" / "http.md").read_text()


def test_an_explicit_null_is_refused(server: CogServer) -> None:
    assert server.predict({"prompt": "x", "seed": None})["code"] == 422


@pytest.mark.parametrize(("body", "status"), [(b"{", 400), (b'{"input": 1', 400), (b'{"webhook": 1}', 422)])
def test_a_body_that_is_no_request_is_answered_in_plain_text(
    server: CogServer, body: bytes, status: int
) -> None:
    answer = server.request("POST", "/predictions", data=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status
    assert answer.headers["content-type"].startswith("text/plain")


def test_the_root_names_a_page_that_is_not_there(server: CogServer) -> None:
    root = server.request("GET", "/").json()
    assert root["docs_url"] == "/docs"
    assert server.request("GET", "/docs").status_code == 404


def test_a_webhook_s_start_says_processing_and_a_prefix_for_outputs_is_ignored(server: CogServer) -> None:
    with receiver() as hook:
        url = f"http://127.0.0.1:{hook.server_port}/hook"
        body: dict[str, Any] = {"input": {"prompt": "x"}, "webhook": url, "output_file_prefix": f"{url}/"}
        answer = server.request("POST", "/predictions", body).json()
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


def test_bad_base64_is_cogs_to_refuse_or_to_make_empty(server: CogServer) -> None:
    empty = server.predict({"prompt": "x", "input_audio": "data:audio/wav;base64,"})
    assert empty["code"] == 200
    upper = server.predict({"prompt": "x", "input_audio": data_uri(b"RIFF").replace("data:", "DATA:")})
    assert upper["code"] == 200, "Cog hands it on as a string"
