"""A real Cog server for a test, which `scripts/serve` starts."""

import contextlib
import os
import re
import shutil
import signal
import socket
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

from musicgen_svc.runtime.json_object import Json

ROOT = Path(__file__).resolve().parents[2]
STACKS = Path(__file__).with_name("stacks")
ANSWER_S = 120.0
"""How long an answer may take before the test fails: many times the slowest request."""
FREED_S = 60.0
"""How long Cog may take to free the slot of a prediction that it has answered."""
SETTLED = ("READY", "SETUP_FAILED")


class CogServer:
    """A server that runs inside a `with` block.

    with CogServer(COG_WEIGHTS=str(weights / "melody")) as server:
        reply = server.predict({"prompt": "a waltz", "duration": 1})
    """

    def __init__(
        self,
        *arguments: str,
        root: Path = ROOT,
        cwd: Path | None = None,
        setup_s: float = 240.0,
        **environment: str,
    ) -> None:
        """Prepares a server.

        Args:
            arguments: for scripts/serve.
            root: the checkout that is served.
            cwd: where scripts/serve is started.
            setup_s: how long set-up may take.
            environment: variables that are set for scripts/serve.
        """
        self._arguments = arguments
        self._root = root
        self._cwd = cwd
        self._setup_s = setup_s
        self._environment = environment
        self._last_log = ""
        self.url = ""
        self.answer_s = ANSWER_S

    def __enter__(self) -> "CogServer":
        self._folder = tempfile.TemporaryDirectory(prefix="serve-test-")
        self._log = Path(self._folder.name) / "log"
        self._stacks = Path(self._folder.name) / "stacks"
        self._stacks.mkdir()
        with self._log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, *self._command(), *self._arguments],
                cwd=self._cwd,
                env=os.environ
                | {
                    "PYTHONPATH": f"{self._root}{os.pathsep}{STACKS}",
                    "STACKS_FOLDER": str(self._stacks),
                    "PORT": "0",
                    "COG_MAX_CONCURRENCY": "1",
                    "MUSICGEN_DRAIN_GRACE_S": "1",
                }
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

    def _command(self) -> list[str]:
        """What the environment's Python runs."""
        # -P as in scripts/serve: the served checkout may not be the current folder
        return ["-P", "-m", "musicgen_svc.cli.serve", "--stop-at-eof"]

    def _await_set_up(self) -> None:
        deadline = time.monotonic() + self._setup_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"The server ended with {self.process.returncode}:\n{self.log}")
            if not self.url and (found := re.search(r"http://\S+:\d+", self.log)):
                self.url = found.group()
            with contextlib.suppress(requests.ConnectionError):
                if self.url and self.health()["status"] in SETTLED:
                    return
            time.sleep(0.05)
        raise RuntimeError(f"Set-up took longer than {self._setup_s} s:\n{self.log}\n{self._threads()}")

    @property
    def log(self) -> str:
        """Everything that the server has printed so far, also after its end."""
        return self._log.read_text(errors="replace") if self._log.exists() else self._last_log

    def request(self, method: str, path: str, json: Any = None, **more: Any) -> requests.Response:
        """Sends a request. A server that does not answer is stopped, so that the next tests fail at once."""
        with requests.Session() as session:
            session.trust_env = False  # a proxy cannot reach the loopback device
            try:
                return session.request(
                    method, self.url + path, json=json, **{"timeout": self.answer_s, **more}
                )
            except requests.Timeout:
                if "timeout" in more:
                    raise
                seen = f"{self.log}\n{self._threads()}"
        self.process.terminate()
        time.sleep(0.5)
        self.process.terminate()  # after the second signal it does not wait for predictions
        raise AssertionError(f"No answer to {method} {path} within {self.answer_s} s:\n{seen}")

    def _threads(self) -> str:
        """Describes what each thread of the server does: Python's stacks, and the kernel's wait channel."""
        pids = [self.process.pid, *descendants(self.process.pid)]
        for pid in pids:
            if (self._stacks / str(pid)).exists():
                os.kill(pid, signal.SIGUSR1)
        time.sleep(1)
        shown = []
        for pid in pids:
            stacks = self._stacks / str(pid)
            shown.append(f"Process {pid}\n{stacks.read_text() if stacks.exists() else ''}")
            for task in Path(f"/proc/{pid}/task").glob("*"):
                with contextlib.suppress(OSError):
                    name, waits = ((task / file).read_text().strip() for file in ("comm", "wchan"))
                    shown.append(f"  {task.name} {name}: {waits}")
        return "\n".join(shown)

    def health(self) -> Json:
        """The answer of the health check."""
        return self._json(self.request("GET", "/health-check"))

    def predict(self, values: Mapping[str, Any], id: str | None = None) -> Json:
        """Runs one prediction. Returns the reply's JSON, with the HTTP status as `code`.

        Cog replies a moment before it frees the prediction's slot. The next request of a fast client may
        therefore be answered with 409, and is repeated here.
        """
        method, path = ("PUT", f"/predictions/{id}") if id else ("POST", "/predictions")
        deadline = time.monotonic() + FREED_S
        while (response := self.request(method, path, {"input": values})).status_code == 409:
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        return {"code": response.status_code, **self._json(response)}

    def submit(self, values: Mapping[str, Any], id: str) -> "Future[Json]":
        """Starts `predict` in the background. Returns when the prediction runs or has ended."""
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
        """The state of a prediction. None: it does not run. Starts nothing, because the input is invalid."""
        response = self.request("PUT", f"/predictions/{id}", {"input": {"duration": 0}})
        return self._json(response) if response.status_code == 202 else None

    def cancel(self, id: str) -> int:
        """Cancels a prediction. Returns the HTTP status: 200, or 404 if it does not run."""
        return self.request("POST", f"/predictions/{id}/cancel").status_code

    def stop(self, timeout_s: float = 60.0) -> int:
        """Stops the server if it still runs. Returns its exit status. Idempotent."""
        self.process.terminate()
        try:
            status = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            for pid in descendants(self.process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
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


class BareCog(CogServer):
    """A Cog server that runs as in an image: without `scripts/serve`."""

    def __init__(self, root: Path = ROOT, **environment: str) -> None:
        """Prepares a server. `root`: the checkout that is served."""
        port = free_port()
        settings = {"PORT": str(port), "COG_PREDICT_TYPE_STUB": "predict.py:Predictor"}
        super().__init__(root=root, cwd=root, **settings, **environment)
        self.url = f"http://127.0.0.1:{port}"
        (root / ".cog").mkdir(exist_ok=True)
        shutil.copy(root / "openapi_schema.json", root / ".cog")

    def _command(self) -> list[str]:
        return ["-m", "cog.server.http", "--host", "127.0.0.1"]


def free_port() -> int:
    """A free port of the loopback device."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
    return port


def descendants(pid: int) -> list[int]:
    """All processes that a process has started, directly or not. Empty if there is no /proc."""
    below: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that ended meanwhile
            below += map(int, task.read_text().split())
    return below + [pid for child in below for pid in descendants(child)]
