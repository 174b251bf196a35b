"""`python -m musicgen_svc.cli.probe`: a liveness probe for a container in which Cog starts the server.

It ends with 0 while the server works or sets itself up, else with 1 and one sentence. It knows only what it
sees at one time: whoever calls it decides how many failures in a row are too many.
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
"""How long a health check may take; Cog gives its worker 10 s."""


def fault(health: Mapping[str, Any] | None, work_dir: Path) -> str | None:
    """Why a server does not serve, or None.

    Args:
        health: what its health check says; None: no answer.
        work_dir: where the service keeps a folder for each request that runs.
    """
    if health is None:
        return "The server does not answer."
    status = health.get("status")
    if status in ("SETUP_FAILED", "UNHEALTHY", "DEFUNCT"):
        return f"The server's health is {status}."
    if status == "BUSY" and not any(folder.is_dir() for folder in work_dir.glob("musicgen-*/*/")):
        return "The server says BUSY, but no request runs: its places are lost, or wait for input files."
    return None


def health(port: int) -> Mapping[str, Any] | None:
    """What the health check of a server on the loopback device says; None: no answer."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy knows our loopback
    try:
        with opener.open(f"http://127.0.0.1:{port}/health-check", timeout=ANSWER_S) as response:
            answer = json.load(response)
    except (OSError, ValueError):
        return None
    return answer if isinstance(answer, dict) else None


def main() -> int:
    work_dir = Path(os.environ.get("MUSICGEN_WORK_DIR") or tempfile.gettempdir())
    reason = fault(health(int(os.environ.get("PORT") or 5000)), work_dir)
    if reason is not None:
        print(reason, file=sys.stderr)
    return 0 if reason is None else 1


if __name__ == "__main__":
    sys.exit(main())
