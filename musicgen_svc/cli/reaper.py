"""Kills the processes of one Cog server and removes its files, even if its supervisor is killed.

The reaper is a separate process. It reads from a pipe which processes and folders belong to the Cog server.
It acts when the other end of the pipe closes, which happens however the supervisor ends. Linux's parent death
signal cannot be used, because it is sent when the thread that started a process ends, not when the process
ends.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

GROUP_END_S = 5.0
"""How long killed processes may take to disappear."""


def end_group(group: int) -> None:
    """Kills a process group, and returns when it has disappeared, or after GROUP_END_S."""
    deadline = time.monotonic() + GROUP_END_S
    while time.monotonic() < deadline:
        try:
            os.killpg(group, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # macOS raises the second if only zombies are left
            return
        time.sleep(0.02)


class Reaper:
    """Starts a reaper, and tells it what to kill and remove."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __spec__.name],
            stdin=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C and a kill of the supervisor's group must not reach it
            text=True,
        )

    def watch_group(self, group: int) -> None:
        """Has this process group killed at the end."""
        self._tell(group=group)

    def watch_folder(self, folder: Path) -> None:
        """Has this folder removed at the end."""
        self._tell(folder=str(folder))

    def forget_folder(self, folder: Path) -> None:
        """Notes that this folder was removed already."""
        self._tell(forget=str(folder))

    def reap(self) -> None:
        """Kills and removes everything now. Returns when this is done."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()

    def _tell(self, **fact: object) -> None:
        """Writes one message to the reaper."""
        assert self._process.stdin
        if not self._process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):  # it was killed; the supervisor cleans up as well
                self._process.stdin.write(json.dumps(fact) + "\n")
                self._process.stdin.flush()


def main() -> None:
    """Runs the reaper: reads messages until the pipe closes, then kills and removes."""
    group = 0
    folders: dict[str, None] = {}
    for line in sys.stdin:
        fact = json.loads(line)
        group = fact.get("group", group)
        if "folder" in fact:
            folders[fact["folder"]] = None
        folders.pop(fact.get("forget", ""), None)
    if group:
        end_group(group)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
