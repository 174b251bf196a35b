"""Ends one Cog server for good: kills its processes and removes its files, even if its supervisor is killed.

This is a process of its own. It reads from a pipe what belongs to the Cog server, and begins when the other
end of the pipe closes, which happens however the supervisor ends. Linux's death signal would not do: it
follows the thread that started a process, not the process.
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
"""How long killed processes may take to go."""


def end_group(group: int) -> None:
    """Kills a process group, and returns when it is gone or will not go."""
    deadline = time.monotonic() + GROUP_END_S
    while time.monotonic() < deadline:
        try:
            os.killpg(group, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # macOS raises the second where only zombies are left
            return
        time.sleep(0.02)


class Reaper:
    """The supervisor's end of the pipe."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __spec__.name],  # -P: not what lies in the current folder
            stdin=subprocess.PIPE,
            start_new_session=True,  # neither Ctrl-C nor a kill of the supervisor's group may reach it
            text=True,
        )

    def watch_group(self, group: int) -> None:
        """This process group is to be killed."""
        self._tell(group=group)

    def watch_folder(self, folder: Path) -> None:
        """This folder is to be removed."""
        self._tell(folder=str(folder))

    def forget_folder(self, folder: Path) -> None:
        """This folder is gone already."""
        self._tell(forget=str(folder))

    def reap(self) -> None:
        """Kills and removes now, and returns when it is done."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()

    def _tell(self, **fact: object) -> None:
        assert self._process.stdin
        if not self._process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):  # somebody killed it: the supervisor clears up as well
                self._process.stdin.write(json.dumps(fact) + "\n")
                self._process.stdin.flush()


def main() -> None:
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
