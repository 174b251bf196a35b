"""Finds the processes of a server through /proc, and waits for what they do."""

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from server import CogServer, descendants

LIMIT_S = 200.0
"""How long whatever a test waits for may take before the test fails. pytest's own limit is 300 s."""

needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")


def processes_with(text: str) -> list[int]:
    """Processes whose environment contains `text`, without zombies, which hold no resources."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if text.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def process(server: CogServer, argument: str) -> int:
    """The server's process with this text on its command line."""
    for pid in descendants(server.process.pid):
        with contextlib.suppress(OSError):
            if argument in Path(f"/proc/{pid}/cmdline").read_text():
                return pid
    raise AssertionError(f"no process with {argument}")


def worker(server: CogServer) -> int:
    """The process that holds the models."""
    return process(server, "_run_worker")


def cog(server: CogServer) -> int:
    """Cog's own process, which answers HTTP."""
    return process(server, "cog.server.http")


def variable(pid: int, name: str) -> str:
    """An environment variable of a process."""
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    start = f"{name}=".encode()
    return next(entry for entry in variables if entry.startswith(start)).removeprefix(start).decode()


def cpu_s(pid: int) -> float:
    """CPU time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_bytes(pid: int) -> int:
    """Memory of a process that is in RAM."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


def wait_for(condition: Callable[[], object], limit_s: float = LIMIT_S) -> None:
    """Returns when the condition holds, and fails if it does not within the limit."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(0.02)
