"""`python -m musicgen_svc.cli.probe`: the probes of a container in which Cog starts the server.

    probe started   whether set-up has ended well: a start-up probe
    probe ready     whether the server accepts a request now: a readiness probe
    probe alive     whether the server works or is being set up: a liveness probe, and the default

Cog's health check always answers with HTTP 200, and only its JSON says how the server is. The exit status of
a probe is 0, or it is 1 and the probe prints one sentence. A probe looks at one moment only: its caller
decides how many failures in a row are too many.
"""

import argparse
import json
import os
import sys
import tempfile
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from musicgen_svc.errors import ServiceError
from musicgen_svc.runtime.output_files import request_runs
from musicgen_svc.settings import Settings

ANSWER_S = 12.0
"""How long a health check may take. Cog gives its worker 10 s."""
QUESTIONS = ("started", "ready", "alive")


def fault(
    question: str, health: Mapping[str, Any] | None, work_dir: Path, drain_file: Path | None = None
) -> str | None:
    """Says why a server has not started, is not ready or is not alive. None: it is.

    Args:
        question: one of `QUESTIONS`.
        health: the answer of the server's health check. None: there is none.
        work_dir: where the service has a folder for each request that runs.
        drain_file: exists when the server accepts no more requests.
    """
    if health is None:
        return "The server does not answer."
    status = health.get("status")
    if status not in ("UNKNOWN", "STARTING", "READY", "BUSY"):
        return f"The server's health is {status}."
    if question == "alive":
        if status == "BUSY" and not request_runs(work_dir):
            return "The server says BUSY, but no request runs: its places are lost, or wait for input files."
        return None
    if status in ("UNKNOWN", "STARTING"):
        return "The server is being set up."
    if question == "ready":
        if status == "BUSY":
            return "The server is BUSY: as many requests run and wait as COG_MAX_CONCURRENCY allows."
        if drain_file is not None and drain_file.exists():
            return "The server is shutting down."
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


def port() -> int:
    """The port on which Cog listens."""
    return int(os.environ.get("PORT") or 5000)


def work_dir(settings: Settings) -> Path:
    """The folder in which the service has its folder."""
    return settings.work_dir or Path(tempfile.gettempdir())


def main() -> int:
    """Runs the probe. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m musicgen_svc.cli.probe", description="Says whether the server works."
    )
    parser.add_argument("question", nargs="?", default="alive", choices=QUESTIONS)
    question = parser.parse_args().question
    try:
        settings = Settings.from_environment(os.environ)
    except ServiceError as error:
        print(error, file=sys.stderr)
        return 1
    reason = fault(question, health(port()), work_dir(settings), settings.drain_file)
    if reason is not None:
        print(reason, file=sys.stderr)
    return 0 if reason is None else 1


if __name__ == "__main__":
    sys.exit(main())
