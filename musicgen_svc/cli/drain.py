"""`python -m musicgen_svc.cli.drain`: lets running requests end before a container is stopped.

It is the preStop hook of an image in which Cog starts the server, because Cog cannot drain. It makes the file
MUSICGEN_DRAIN_FILE, at which the service refuses new requests and those that wait. It returns when no request
runs any more, or after MUSICGEN_DRAIN_GRACE_S. `scripts/serve` drains by itself when it receives SIGTERM.
"""

import os
import sys
import time
from pathlib import Path

from musicgen_svc.cli import probe
from musicgen_svc.errors import ServiceError
from musicgen_svc.runtime.output_files import request_runs
from musicgen_svc.settings import Settings

LOOK_S = 0.25
"""How often it looks whether a request runs."""
SETTLE_S = 1.0
"""How long no request must have run.
Cog sends the answer and the webhook when the service has ended a request."""


def drain(file: Path, port: int, work_dir: Path, grace_s: float) -> bool:
    """Makes the drain file, and waits until no request runs.

    Args:
        file: the drain file of the service.
        port: of the server, on the loopback device.
        work_dir: where the service has a folder for each request that runs.
        grace_s: how long to wait.

    Returns:
        bool: whether no request runs, or the server cannot end those that run, because it no longer works.

    Raises:
        OSError: the file cannot be made.
    """
    file.touch()
    idle_since = time.monotonic()
    deadline = idle_since + grace_s
    while (now := time.monotonic()) - idle_since < SETTLE_S:
        if now > deadline:
            return False
        time.sleep(LOOK_S)
        if request_runs(work_dir):
            if probe.fault("alive", probe.health(port), work_dir) is not None:
                return True
            idle_since = time.monotonic()
    return True


def main() -> int:
    """Runs the command. Returns the exit status.

    Raises:
        SystemExit: a setting is missing or wrong, or requests still run after the grace.
    """
    try:
        settings = Settings.from_environment(os.environ)
    except ServiceError as error:
        sys.exit(str(error))
    file = settings.drain_file
    if file is None:
        sys.exit("MUSICGEN_DRAIN_FILE is not set: name a file that this command and the service can make.")
    try:
        ended = drain(file, probe.port(), probe.work_dir(settings), settings.drain_grace_s)
    except OSError as error:
        sys.exit(f"MUSICGEN_DRAIN_FILE is {str(file)!r}, which cannot be made: {error.strerror or error}.")
    if not ended:
        sys.exit("Requests still run after MUSICGEN_DRAIN_GRACE_S.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
