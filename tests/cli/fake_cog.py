"""A server that answers like Cog's, for tests of its clients."""

import base64
import json
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from jsonschema import Draft7Validator

from musicgen_svc.runtime.json_object import Json
from tests.cli.repository import SCHEMA

WAV = "data:audio/wav;base64," + base64.b64encode(b"RIFF....").decode()

Answer = tuple[int, Json]
"""HTTP status and body."""


class FakeCog(ThreadingHTTPServer):
    """Answers as coglet 0.23.1 does. A test sets the answers that it needs."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FakeHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.statuses = ["READY"]  # one for each health check; the last one is repeated
        self.set_up_log = ""
        self.schema: Json | None = SCHEMA
        self.outcome: Callable[[str, Json], Answer] = lambda id, values: (
            200,
            {"status": "succeeded", "output": WAV},
        )
        self.running: dict[str, str] = {}  # id -> log so far
        self.started: list[Json] = []
        self.cancelled: list[str] = []
        self.ignored_cancels = 0  # number of cancels that are answered with 200 and do nothing


class FakeHandler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: FakeCog

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        fake = self.server
        if self.path == "/health-check":
            status = fake.statuses.pop(0) if len(fake.statuses) > 1 else fake.statuses[0]
            self._answer(200, {"status": status, "setup": {"logs": fake.set_up_log}})
        elif self.path == "/openapi.json":
            self._answer(*((200, fake.schema) if fake.schema else (503, {"error": "no schema"})))
        elif self.path == "/uploaded/song.mp3":
            self._answer(200, b"ID3 uploaded", "audio/mpeg; charset=binary")
        else:
            self._answer(404, b"<html>", "text/html")

    def do_PUT(self) -> None:
        fake = self.server
        id = self.path.removeprefix("/predictions/")
        values = json.loads(self.rfile.read(int(self.headers["content-length"])))["input"]
        if id in fake.running:
            state = {"id": id, "input": values, "logs": fake.running[id], "status": "processing"}
            self._answer(202, state)
            return
        valid = Draft7Validator({"$ref": "#/components/schemas/Input", **SCHEMA}).is_valid(values)
        if fake.schema and not valid:
            problem = {
                "loc": ["body", "input", "duration"],
                "msg": "99999 is greater than the maximum of 600",
            }
            self._answer(422, {"detail": [{**problem, "type": "value_error"}]})
            return
        fake.started.append(values)
        self._answer(*fake.outcome(id, values))

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        if self.server.ignored_cancels:
            self.server.ignored_cancels -= 1
        else:
            self.server.cancelled.append(self.path.split("/")[2])
        self._answer(200, {})

    def _answer(self, code: int, body: Json | bytes, kind: str = "application/json") -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
