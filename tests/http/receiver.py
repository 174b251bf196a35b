"""A server that receives webhooks and uploads."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


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
