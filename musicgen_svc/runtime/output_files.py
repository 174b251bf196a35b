"""Where outputs lie until Cog has sent them: one folder a server, in it one folder a request.

Cog does not delete the file that `run()` returns. A request's folder goes a grace period after its
end, a server's when it stops, and what a killed server left when the next one starts.
"""

import atexit
import fcntl
import shutil
import tempfile
import threading
from pathlib import Path

from musicgen_svc.errors import GenerationError

_PREFIX = "musicgen-"
_LOCK = "lock"


class WorkFolder:
    """The server's own folder; nobody else's files are ever touched."""

    def __init__(self, parent: Path | None = None) -> None:
        self._parent = parent or Path(tempfile.gettempdir())
        self._making = threading.Lock()
        self._make()
        atexit.register(self.remove)

    def _make(self) -> None:
        self._parent.mkdir(parents=True, exist_ok=True)
        _sweep(self._parent)
        unlocked = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=self._parent))
        self._lock = (unlocked / _LOCK).open("w")  # held as long as this process lives
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        # Under its name, where a neighbour looks for dead servers' folders, it is locked already.
        self._path = unlocked.rename(self._parent / unlocked.name.removeprefix("."))

    @property
    def path(self) -> Path:
        """Where the server's requests have their folders."""
        return self._path

    def new_request(self) -> Path:
        """An empty folder that belongs to one request.

        Raises:
            GenerationError: the disk is full, or nothing may be written there.
        """
        try:
            with self._making:
                if not self._path.is_dir():  # a temporary folder is cleared of what is old
                    self._lock.close()
                    self._make()
            return Path(tempfile.mkdtemp(dir=self._path))
        except OSError as exc:
            reason = exc.strerror or type(exc).__name__  # its own text names the folder
            raise GenerationError(
                f"The server cannot write where outputs lie ({reason}); see MUSICGEN_WORK_DIR."
            ) from exc

    def release(self, request_folder: Path, after_s: float = 0.0) -> None:
        """Removes a request's folder, now or after a grace period."""
        if after_s <= 0:
            shutil.rmtree(request_folder, ignore_errors=True)
            return
        timer = threading.Timer(after_s, self.release, [request_folder])
        timer.daemon = True
        timer.start()

    def remove(self) -> None:
        _remove(self._path)
        self._lock.close()


def _sweep(parent: Path) -> None:
    """Removes the folders of servers that died without doing so: nobody holds their lock."""
    for lock in parent.glob(f"{_PREFIX}*/{_LOCK}"):
        try:
            with lock.open() as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(lock.parent)
        except OSError:
            continue  # another server's, alive or another user's


def _remove(folder: Path) -> None:
    """The lock at last: without it the rest would be nobody's, if this process were killed over it."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.name != _LOCK:
            shutil.rmtree(entry, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
