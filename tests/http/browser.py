"""A headless Chromium for a test, driven over a pipe with the Chrome DevTools Protocol."""

import base64
import contextlib
import fcntl
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATH = next(filter(None, map(shutil.which, NAMES)), None)
OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--no-proxy-server", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--remote-debugging-pipe", "--window-size=800,900",
)  # fmt: skip
ANSWER_S = 60.0

needs_chromium = pytest.mark.skipif(PATH is None, reason=f"needs one of {', '.join(NAMES)} on PATH")


class Browser:
    """A page in a browser."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        """Attaches to a new, empty page. The arguments are file descriptors of the pipe."""
        self._to, self._from = to_browser, from_browser
        self._ids, self._buffer = itertools.count(1), b""
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Calls a method of the protocol, and returns its result. Events are ignored."""
        message = {"id": next(self._ids), "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._buffer:
                data = os.read(self._from, 2**16)
                assert data, "the browser has ended"
                self._buffer += data
            line, _, self._buffer = self._buffer.partition(b"\0")
            answer: dict[str, Any] = json.loads(line)
            if answer.get("id") == message["id"]:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def run(self, script: str) -> Any:
        """Evaluates JavaScript, as if by a click of the user, and returns its value."""
        result = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def open(self, url: str, before: str = "") -> None:
        """Opens a URL. `before`: JavaScript that runs before the page's own."""
        self.call("Page.addScriptToEvaluateOnNewDocument", source=before)
        self.call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")

    def wait_for(self, condition: str) -> None:
        """Returns when a JavaScript expression is true."""
        script = f"""new Promise((resolve, reject) => {{
            const end = performance.now() + {ANSWER_S * 1000};
            (function poll() {{
                if ({condition}) resolve(true);
                else if (performance.now() > end) reject(new Error("not true: " + {json.dumps(condition)}));
                else setTimeout(poll, 10);
            }})();
        }})"""
        self.run(script)

    def screenshot(self, path: Path) -> None:
        """Writes what the page looks like to a PNG file."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """Context manager: a browser with an empty page and a profile of its own."""
    assert PATH is not None
    with tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True) as profile:
        # The browser reads commands from descriptor 3 and writes answers to 4. Here they are above 9 first.
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in itertools.chain(*(os.pipe() for _ in range(2)))]
        read_command, write_command, read_answer, write_answer = ends
        process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{read_command} 4>&{write_answer}', "_", PATH, *OPTIONS,
             f"--user-data-dir={profile}"],
            pass_fds=(read_command, write_answer), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, env=os.environ | {"HOME": profile},
        )  # fmt: skip
        os.close(read_command)
        os.close(write_answer)
        watchdog = threading.Timer(5 * ANSWER_S, process.kill)  # so that no read waits for ever
        watchdog.start()
        try:
            yield Browser(write_command, read_answer)
        finally:
            watchdog.cancel()
            process.kill()
            process.wait()
            os.close(write_command)
            os.close(read_answer)
