"""A local server with the part of the Hugging Face hub's protocol that a download needs. It fails on demand.

Like the hub, it redirects requests for large files to another host, and sends small files itself.
"""

import hashlib
import json
import os
import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

LARGE = 1000
"""Files of at least this many bytes are in large file storage."""


@dataclass(frozen=True)
class Request:
    """A request that the hub has received."""

    method: str
    path: str
    token: str | None


@dataclass(frozen=True)
class Failure:
    """How one answer fails."""

    after: int
    """Bytes that are sent before."""
    how: str
    """`close`, `reset`, or `stall` until the hub is closed."""


class Hub(ThreadingHTTPServer):
    """Publishes `files[repository][name]`. The other attributes make it fail."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, dict[str, bytes]] = {}
        self.refuses: dict[str, int] = {}
        """Repository -> HTTP status with which it is refused."""
        self.token: str | None = None
        """If set, a request without this token is answered with 401."""
        self.babbles = False
        """Whether questions about models are answered with other JSON than a hub's."""
        self.damaged: set[str] = set()
        """Names of files whose last byte is sent wrong."""
        self.failures: dict[str, list[Failure]] = {}
        """Name of a file -> how its next answers fail. Later answers are complete."""
        self.requests: list[Request] = []
        self.transfers: list[tuple[str, int]] = []
        """Name of a file, and the byte at which a transfer of it began."""
        self.closed = threading.Event()

    def revision(self, repository: str) -> str:
        """The present commit of a repository."""
        contents = [(name, _git_sha1(content)) for name, content in self.files[repository].items()]
        return hashlib.sha1(repr(sorted(contents)).encode()).hexdigest()

    def starts(self, name: str) -> list[int]:
        """Where each transfer of a file began."""
        return [start for file, start in self.transfers if file == name]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Prints nothing, because a client that closes its connection is no error here."""


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Context manager: a hub that answers."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.closed.set()
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        hub, path = self.server, urlsplit(self.path).path
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        hub.requests.append(Request(self.command, path, self.headers.get("Authorization")))
        if path.startswith("/storage/"):
            _, _, organisation, model, name = path.split("/")
            self._content(f"{organisation}/{model}", name, match)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            if self._admitted(found[1], found[2]):
                self._json(200, ["no model"] if hub.babbles else self._info(found[1]))
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if self._admitted(found[1], found[2]):
                self._resolve(found[1], found[3], match)
        else:
            self._json(404, {})

    def _admitted(self, repository: str, revision: str | None) -> bool:
        hub = self.server
        status = hub.refuses.get(repository)
        if status is None and hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            status = 401
        code = {401: "RepoNotFound", 403: "GatedRepo", 404: "RepoNotFound"}.get(status or 0)
        if status is None and repository not in hub.files:
            status, code = 404, "RepoNotFound"
        elif status is None and revision not in (None, "main", hub.revision(repository)):
            status, code = 404, "RevisionNotFound"
        if status is not None:
            self._json(status, {"error": "refused"}, {"X-Error-Code": code} if code else {})
        return status is None

    def _info(self, repository: str) -> dict[str, Any]:
        siblings = []
        for name, content in self.server.files[repository].items():
            sibling: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": _git_sha1(content)}
            if len(content) >= LARGE:
                sha256 = hashlib.sha256(content).hexdigest()
                sibling["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 135}
            siblings.append(sibling)
        return {"id": repository, "sha": self.server.revision(repository), "siblings": siblings}

    def _resolve(self, repository: str, name: str, span: re.Match[str] | None) -> None:
        content = self.server.files[repository][name]
        commit = {"X-Repo-Commit": self.server.revision(repository)}
        if len(content) < LARGE:
            self._content(repository, name, span, commit | {"ETag": f'"{_git_sha1(content)}"'})
            return
        self.send_response(302)
        headers = commit | {
            "Location": f"http://localhost:{self.server.server_port}/storage/{repository}/{name}",
            "X-Linked-Size": str(len(content)),
            "X-Linked-ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "Content-Length": "0",
        }
        self._headers(headers)

    def _content(
        self, repository: str, name: str, span: re.Match[str] | None, headers: dict[str, str] | None = None
    ) -> None:
        content = self.server.files[repository][name]
        if name in self.server.damaged:
            content = content[:-1] + bytes([content[-1] ^ 1])
        start = int(span[1]) if span else 0
        self.send_response(206 if span else 200)
        ranged = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if span else {}
        self._headers({"Content-Length": str(len(content) - start)} | ranged | (headers or {}))
        if self.command == "GET":
            self.server.transfers.append((name, start))
            failures = self.server.failures.get(name)
            self._send(content[start:], failures.pop(0) if failures else None)

    def _send(self, content: bytes, failure: Failure | None) -> None:
        if failure is None:
            self.wfile.write(content)
            return
        self.wfile.write(content[: failure.after])
        if failure.how == "stall":
            self.server.closed.wait()
        elif failure.how == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())  # before the server can end it in order
        self.close_connection = True

    def _json(self, status: int, body: object, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self._headers(
            {"Content-Type": "application/json", "Content-Length": str(len(content))} | (headers or {})
        )
        self.wfile.write(content)

    def _headers(self, headers: dict[str, str]) -> None:
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def _git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
