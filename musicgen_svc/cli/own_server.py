"""A server that `scripts/predict` starts for one prediction."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from musicgen_svc.cli.client import Client, FailedError
from musicgen_svc.cli.cog_log import sentence

GRACE_S = 5.0
"""How long the prediction may take to end when the server is stopped."""
STOP_S = 20.0
"""How long the server may take to stop: this grace, and what `scripts/serve` itself needs."""


@contextlib.contextmanager
def own_server() -> Iterator[Client]:
    """Context manager: starts a server on a free loopback port, and stops it at the end of the block.

    If the block ends with an error whose cause only the server's log holds, the log is kept, and a note of
    the error names its path.

    Raises:
        FailedError: the server did not start.
    """
    folder = Path(tempfile.mkdtemp(prefix="musicgen-"))
    log, keep_log = folder / "server.log", False
    try:
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "musicgen_svc.cli.serve", "--stop-at-eof"],
                env=os.environ
                | {"HOST": "127.0.0.1", "PORT": "0", "LOG_FORMAT": "console", "COG_MAX_CONCURRENCY": "1"}
                | {"MUSICGEN_DRAIN_GRACE_S": str(GRACE_S), "MUSICGEN_METRICS_PORT": "0"},
                stdin=subprocess.PIPE,  # its end makes the server stop, even if this process is killed
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches this process alone, which then stops the server
            )
        try:
            yield Client(_await_url(process, log))
        finally:
            _stop(process)
    except FailedError as error:
        if keep_log := error.in_log:
            error.add_note(f"The server's log: {log}")
        raise
    finally:
        if not keep_log:
            shutil.rmtree(folder, ignore_errors=True)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Stops the server, and kills it if it does not stop in time."""
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    assert process.stdin
    process.stdin.close()


def _await_url(process: "subprocess.Popen[bytes]", log: Path) -> str:
    """Waits until the server's log shows the URL that it listens on, and returns the URL.

    Raises:
        FailedError: the server ended before.
    """
    while process.poll() is None:
        if found := re.search(r"http://\S+:\d+", log.read_text(errors="replace")):
            return found.group()
        time.sleep(0.05)
    text = log.read_text(errors="replace")
    raise FailedError(f"The server did not start: {sentence(text)}", in_log="Traceback" in text)
