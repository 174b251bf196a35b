"""A real Cog server for a test: coglet and its worker, started as `scripts/serve` starts them."""

import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any

import requests

ROOT = Path(__file__).resolve().parents[2]
FREED_S = 2.0
SETTLED = ("READY", "SETUP_FAILED")

Json = dict[str, Any]


class CogServer:
    """Starts on entering, stops on leaving.

    with CogServer(COG_WEIGHTS=str(weights / "melody")) as server:
        reply = server.predict({"prompt": "a waltz", "duration": 1})
    """

    def __init__(
        self,
        *arguments: str,
        root: Path = ROOT,
        cwd: Path | None = None,
        setup_s: float = 120.0,
        **environment: str,
    ) -> None:
        """`arguments` go to scripts/serve, `environment` beside our own; `root`: the checkout to serve."""
        self._arguments = arguments
        self._root = root
        self._cwd = cwd
        self._setup_s = setup_s
        self._environment = environment
        self._last_log = ""
        self.url = ""

    def __enter__(self) -> "CogServer":
        self._folder = tempfile.TemporaryDirectory(prefix="serve-test-")
        self._log = Path(self._folder.name) / "log"
        with self._log.open("wb") as out:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    str(self._root / "scripts" / "_serve.py"),
                    "--stop-at-eof",
                    *self._arguments,
                ],
                cwd=self._cwd,
                env=os.environ
                | {"PYTHONPATH": str(self._root), "PORT": "0", "COG_MAX_CONCURRENCY": "1"}
                | self._environment,
                stdin=subprocess.PIPE,  # closes with the test process, however that ends
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        try:
            self._await_set_up()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _await_set_up(self) -> None:
        deadline = time.monotonic() + self._setup_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"The server ended with {self.process.returncode}:\n{self.log}")
            if not self.url and (found := re.search(r"http://\S+:\d+", self.log)):
                self.url = found.group()
            if self.url and self.health()["status"] in SETTLED:
                return
            time.sleep(0.05)
        raise RuntimeError(f"Set-up took longer than {self._setup_s} s:\n{self.log}")

    @property
    def log(self) -> str:
        """All that the server has shown so far, also after its end."""
        return self._log.read_text(errors="replace") if self._log.exists() else self._last_log

    def request(self, method: str, path: str, json: Any = None, **more: Any) -> requests.Response:
        with requests.Session() as session:
            session.trust_env = False  # a proxy does not know our loopback
            return session.request(method, self.url + path, json=json, **{"timeout": 300, **more})

    def health(self) -> Json:
        return self._json(self.request("GET", "/health-check"))

    def predict(self, values: Mapping[str, Any], id: str | None = None) -> Json:
        """The reply's JSON with the HTTP status as `code`.

        Cog replies an instant before it frees the prediction's place: a client as quick as a test can
        be told 409 then, and tries again.
        """
        method, path = ("PUT", f"/predictions/{id}") if id else ("POST", "/predictions")
        deadline = time.monotonic() + FREED_S
        while (response := self.request(method, path, {"input": values})).status_code == 409:
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        return {"code": response.status_code, **self._json(response)}

    def submit(self, values: Mapping[str, Any], id: str) -> "Future[Json]":
        """`predict` in the background, returned from once the prediction runs or is over."""
        future: Future[Json] = Future()

        def send() -> None:
            try:
                future.set_result(self.predict(values, id))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=send, daemon=True).start()
        while not future.done() and self.state(id) is None:
            time.sleep(0.02)
        return future

    def state(self, id: str) -> Json | None:
        """What Cog knows of a prediction that runs, None of another one. Starts nothing."""
        response = self.request("PUT", f"/predictions/{id}", {"input": {"duration": 0}})
        return self._json(response) if response.status_code == 202 else None

    def cancel(self, id: str) -> int:
        """The HTTP status: 200, or 404 for a prediction that does not run."""
        return self.request("POST", f"/predictions/{id}/cancel").status_code

    def stop(self, timeout_s: float = 20.0) -> int:
        """Stops the server if it still runs; its exit status. Twice is once."""
        self.process.terminate()
        try:
            status = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        assert self.process.stdin
        self.process.stdin.close()
        self._last_log = self.log
        self._folder.cleanup()
        return status

    @staticmethod
    def _json(response: requests.Response) -> Json:
        answer = response.json()
        assert isinstance(answer, dict)
        return answer
