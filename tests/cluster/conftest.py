"""A real Ray cluster of one machine with two processor cores, for one folder of tests."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from musicgen_svc.batch.cluster import _connect
from tests.batch.jobs import environment
from tests.cli.repository import ROOT
from tests.cluster.workers import process_id

VARIABLES = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}

THIS_PYTHON = {"MUSICGEN_NO_VENV": "1", "MUSICGEN_PYTHON": sys.executable}
"""Makes scripts/ray use the packages of the tests."""


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port: int = bound.getsockname()[1]
        return port


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port at which ray:// reaches the cluster, which has run a task for a client before."""
    # A socket's path has at most 107 bytes.
    folder, gcs, client = Path(f"/tmp/ray-{os.getpid()}"), free_port(), free_port()
    log = tmp_path_factory.mktemp("ray") / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [
                ROOT / "scripts" / "ray", "start", "--head", "--block",
                "--num-cpus", "2", "--temp-dir", folder,
                "--port", str(gcs), "--ray-client-server-port", str(client), "--include-dashboard", "false",
                "--object-store-memory", "200000000", "--disable-usage-stats",
            ],
            env=environment(ROOT / "weights", **VARIABLES, **THIS_PYTHON),
            stdout=out, stderr=subprocess.STDOUT, process_group=0,
        )  # fmt: skip
    try:
        while not reachable(client):
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        serve_once(client)
        yield client
    finally:
        below = descendants(process.pid)  # some of them overwrite what would tell whose they are
        process.kill()
        process.wait()
        while left := [*below, *processes_with(str(folder))]:  # some of them start others
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            below = []
            time.sleep(0.1)
        shutil.rmtree(folder, ignore_errors=True)


def serve_once(port: int) -> None:
    """Runs one task as a client. Ray's processes read their modules meanwhile, which can take minutes."""
    _connect(f"ray://127.0.0.1:{port}", {})
    try:
        assert ray.get(ray.remote(process_id).remote()) != os.getpid()
    finally:
        ray.shutdown()


def reachable(port: int) -> bool:
    """Whether something listens at a port."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and those that they have started."""
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(child) for thread in threads for child in (thread / "children").read_text().split()]
    except OSError:  # it has ended
        return []
    return [*children, *(below for child in children for below in descendants(child))]


def processes_with(*texts: str) -> list[int]:
    """The other processes whose command line and environment together hold all texts."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            told = (process / "cmdline").read_bytes() + b" " + (process / "environ").read_bytes()
        except OSError:  # it has ended, or belongs to another user
            continue
        if all(text.encode() in told for text in texts) and int(process.name) != os.getpid():
            found.append(int(process.name))
    return found
