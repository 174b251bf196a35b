"""Clips of rows: files as they are, URLs fetched, and every fault of a server as one sentence."""

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from urllib3.util import Retry

from musicgen_svc.batch import clips
from musicgen_svc.batch.clips import clip_hash, local_clip
from musicgen_svc.errors import AudioError


class _Server(BaseHTTPRequestHandler):
    """Sends 1,000 bytes for /clip, after a failure for /retried, and 404 for anything else."""

    failures = 0

    def do_GET(self) -> None:
        if self.path == "/retried" and not _Server.failures:
            _Server.failures = 1
            self.send_error(503)
        elif self.path in ("/clip", "/retried"):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"x" * 1000)
        else:
            self.send_error(404)

    def log_message(self, format: str, *args: object) -> None:
        """Prints nothing."""


@pytest.fixture
def url() -> Iterator[str]:
    _Server.failures = 0
    with ThreadingHTTPServer(("127.0.0.1", 0), _Server) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_path_stays_where_it_is_and_a_url_is_fetched(url: str, tmp_path: Path) -> None:
    assert local_clip("/some/clip.wav", tmp_path) == Path("/some/clip.wav")
    fetched = local_clip(f"{url}/clip", tmp_path)
    assert fetched.parent == tmp_path and fetched.read_bytes() == b"x" * 1000
    assert clip_hash(fetched) == hashlib.sha256(b"x" * 1000).hexdigest()


def test_a_server_that_is_busy_is_asked_again(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clips, "_RETRIES", Retry(1, backoff_factor=0, status_forcelist=(503,)))
    assert local_clip(f"{url}/retried", tmp_path).stat().st_size == 1000


def test_what_cannot_be_fetched_is_one_sentence(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clips, "_RETRIES", Retry(0))
    with pytest.raises(
        AudioError, match=r"^input_audio is '.*/gone', for which the server answers 404; give"
    ):
        local_clip(f"{url}/gone", tmp_path)
    with pytest.raises(
        AudioError, match=r"^input_audio is 'http://127.0.0.1:1/a', which cannot be fetched \("
    ):
        local_clip("http://127.0.0.1:1/a", tmp_path)
    monkeypatch.setattr(clips, "MAX_BYTES", 999)
    with pytest.raises(AudioError, match=r"^input_audio is '.*/clip', which is larger than .* MB; give"):
        local_clip(f"{url}/clip", tmp_path)


def test_a_clip_that_no_request_accepts_has_no_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "large").write_bytes(b"x" * 1000)
    monkeypatch.setattr(clips, "MAX_BYTES", 999)
    assert clip_hash(tmp_path) is clip_hash(tmp_path / "absent") is clip_hash(tmp_path / "large") is None
