"""Folders for output files until Cog has sent them: one folder per server, in it one folder per request.

Cog does not delete the file that `run()` returns. A request's folder is removed a grace period after the
request ended, the server's folder when the server stops. What a killed server left behind is removed when the
next server starts. The folders also tell other processes whether a request runs, see `request_runs`.
"""

import atexit
import contextlib
import fcntl
import shutil
import tempfile
import threading
import time
from pathlib import Path
from queue import SimpleQueue

from musicgen_svc.errors import GenerationError

_PREFIX = "musicgen-"
_LOCK = "lock"
_REQUEST, _TEMPORARY = "request-", "temporary-"
"""How the names of folders within the server's own begin."""
_ENDED = ".ended"
"""The end of the name of the empty file beside the folder of a request that has ended."""


class WorkFolder:
    """The server's own folder. Files of others are never removed, except the folders of dead servers."""

    def __init__(self, parent: Path | None = None) -> None:
        """Creates the folder in `parent`; None: in the system's temporary folder.

        Raises:
            OSError: it cannot be created.
        """
        self._parent = parent or Path(tempfile.gettempdir())
        self._making = threading.Lock()
        self._make()
        self._ended: SimpleQueue[tuple[float, Path]] = SimpleQueue()
        threading.Thread(target=self._remove_ended, name="output-files", daemon=True).start()
        atexit.register(self.remove)

    def _make(self) -> None:
        """Creates and locks the folder, after removing those of dead servers."""
        self._parent.mkdir(parents=True, exist_ok=True)
        _sweep(self._parent)
        unlocked = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=self._parent))
        self._lock = (unlocked / _LOCK).open("w")  # locked as long as this process lives
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        # Other servers look for dead servers' folders under the final name; there this one is locked already.
        self._path = unlocked.rename(self._parent / unlocked.name.removeprefix("."))

    @property
    def path(self) -> Path:
        """The folder that holds the folders of the requests."""
        return self._path

    def new_request(self) -> Path:
        """Creates and returns an empty folder for one request.

        Raises:
            GenerationError: the disk is full, or the folder is not writable.
        """
        try:
            with self._making:
                if not self._path.is_dir():  # the system may have removed old temporary files
                    self._lock.close()
                    self._make()
            return Path(tempfile.mkdtemp(prefix=_REQUEST, dir=self._path))
        except OSError as exc:
            reason = exc.strerror or type(exc).__name__  # the full message names the folder
            raise GenerationError(
                f"The server cannot write its output files ({reason}); see MUSICGEN_WORK_DIR."
            ) from exc

    def new_temporary(self) -> Path:
        """Creates and returns an empty folder for temporary files, removed with the server's folder."""
        return Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=self._path))

    def release(self, request_folder: Path, after_s: float = 0.0) -> None:
        """Notes that a request has ended, and removes its folder, now or `after_s` seconds later.

        Folders are removed in the order of these calls, so `after_s` should be the same for all of them.
        """
        marker = _ended_marker(request_folder)
        if after_s <= 0:
            shutil.rmtree(request_folder, ignore_errors=True)
            marker.unlink(missing_ok=True)
            return
        # On a full disk the request seems to run until the folder is removed.
        with contextlib.suppress(OSError):
            marker.touch()
        self._ended.put((time.monotonic() + after_s, request_folder))

    def _remove_ended(self) -> None:
        """Removes the folders of ended requests for ever, each when its time has come."""
        while True:
            due_s, folder = self._ended.get()
            time.sleep(max(0.0, due_s - time.monotonic()))
            self.release(folder)

    def remove(self) -> None:
        """Removes the server's folder and releases its lock."""
        _remove(self._path)
        self._lock.close()


def request_runs(parent: Path) -> bool:
    """Whether a request runs on a server whose `WorkFolder` is in `parent`. One that waits has no folder."""
    folders = parent.glob(f"{_PREFIX}*/{_REQUEST}*/")
    return any(folder.is_dir() and not _ended_marker(folder).exists() for folder in folders)


def _ended_marker(request_folder: Path) -> Path:
    """The file beside a request's folder that says that the request has ended."""
    return request_folder.with_name(request_folder.name + _ENDED)


def _sweep(parent: Path) -> None:
    """Removes the folders of dead servers, whose locks nobody holds."""
    for lock in parent.glob(f"{_PREFIX}*/{_LOCK}"):
        try:
            with lock.open() as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(lock.parent)
        except OSError:
            continue  # the folder of a running server, or of another user


def _remove(folder: Path) -> None:
    """Removes a server's folder, and its lock last.

    If this process is killed in between, the next sweep recognizes the rest of the folder by the lock.
    """
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.name != _LOCK:
            shutil.rmtree(entry, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
