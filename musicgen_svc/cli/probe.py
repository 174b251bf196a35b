"""`python -m musicgen_svc.cli.probe`: a liveness probe for a container in which Cog starts the server.

Its exit status is 0 while the server works or is being set up. Otherwise it is 1, and the probe prints one
sentence. It looks at one moment only: its caller decides how many failures in a row are too many.
"""

import json
import os
import sys
import tempfile
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ANSWER_S = 12.0
"""How long a health check may take. Cog gives its worker 10 s."""


def fault(health: Mapping[str, Any] | None, work_dir: Path) -> str | None:
    """Says why a server does not serve. None: it does.

    Args:
        health: the answer of its health check. None: there is none.
        work_dir: where the service has a folder for each request that runs.
    """
    if health is None:
        return "The server does not answer."
    status = health.get("status")
    if status in ("SETUP_FAILED", "UNHEALTHY", "DEFUNCT"):
        return f"The server's health is {status}."
    if status == "BUSY" and not any(folder.is_dir() for folder in work_dir.glob("musicgen-*/*/")):
        return "The server says BUSY, but no request runs: its slots are lost, or wait for input files."
    return None


def health(port: int) -> Mapping[str, Any] | None:
    """Asks a server on the loopback device for its health. None: no answer."""
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({})
    )  # a proxy cannot reach the loopback device
    try:
        with opener.open(f"http://127.0.0.1:{port}/health-check", timeout=ANSWER_S) as response:
            answer = json.load(response)
    except (OSError, ValueError):
        return None
    return answer if isinstance(answer, dict) else None


def main() -> int:
    """Runs the probe. Returns the exit status."""
    work_dir = Path(os.environ.get("MUSICGEN_WORK_DIR") or tempfile.gettempdir())
    reason = fault(health(int(os.environ.get("PORT") or 5000)), work_dir)
    if reason is not None:
        print(reason, file=sys.stderr)
    return 0 if reason is None else 1


if __name__ == "__main__":
    sys.exit(main())
