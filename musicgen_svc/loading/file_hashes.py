"""Hashes of files, which tell whether two paths hold the same bytes. Each file is hashed only once."""

import hashlib
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from musicgen_svc.checkpoints.damage import check_not_damaged
from musicgen_svc.weights.lock_file import sha256_of


@dataclass(frozen=True)
class FileState:
    """The state of a file at one time. If the content changes, the size, time or inode changes, too."""

    path: Path
    size: int
    modified_ns: int
    inode: tuple[int, int]
    """The device, and the inode on it."""

    @classmethod
    def of(cls, path: Path) -> "FileState":
        """Returns the state of the file at a path.

        Raises:
            OSError: there is no such file.
        """
        found = path.stat()
        return cls(path.resolve(), found.st_size, found.st_mtime_ns, (found.st_dev, found.st_ino))

    def is_of_one_file_with(self, other: "FileState") -> bool:
        """Returns whether both are the same file, under whatever names, and unchanged."""
        return (self.inode, self.size, self.modified_ns) == (other.inode, other.size, other.modified_ns)

    @property
    def unchanged(self) -> bool:
        """Whether the path still holds the file in this state."""
        try:
            return FileState.of(self.path) == self
        except OSError:
            return False


def states_of(paths: Iterable[Path]) -> tuple[FileState, ...]:
    """Returns the states of files that are to be read.

    Raises:
        WeightsError: a file is missing or obviously damaged.
    """
    paths = tuple(paths)
    for path in paths:
        check_not_damaged(path)
    return tuple(map(FileState.of, paths))


class Hashes:
    """Computes the sha256 of files, and remembers them. Several threads may ask at once."""

    def __init__(self) -> None:
        self._known: dict[FileState, str] = {}
        self._lock = threading.Lock()  # held while a file is read, so that no other thread reads it too

    def sha256(self, file: FileState) -> str | None:
        """Returns the sha256 of a file; None if the file has changed since that state."""
        with self._lock:
            if file not in self._known:
                if not file.unchanged:
                    return None
                self._known[file] = sha256_of(file.path)
            return self._known[file]

    def equal(self, some: Sequence[FileState], others: Sequence[FileState]) -> bool:
        """Returns whether both sequences hold the same bytes, file by file.

        Files of different sizes are not read.
        """
        if [file.size for file in some] != [file.size for file in others]:
            return False
        return all(self._equal(one, other) for one, other in zip(some, others, strict=True))

    def _equal(self, one: FileState, other: FileState) -> bool:
        if one.is_of_one_file_with(other):
            return True
        found = self.sha256(one)
        return found is not None and found == self.sha256(other)

    def content(self, files: Sequence[Path]) -> str:
        """Returns the sha256 of one file, or for several files the sha256 of their joined hashes, in order.

        Raises:
            OSError: a file is missing.
        """
        states = [FileState.of(path) for path in files]
        hashes = [self.sha256(state) or sha256_of(state.path) for state in states]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()

    def content_later(self, files: Sequence[Path]) -> Future[str]:
        """Starts `content` in a thread, because hashing a large model takes seconds."""
        return _in_background(lambda: self.content(files))


def _in_background(work: Callable[[], str]) -> Future[str]:
    """Runs a function in a daemon thread; the future has its result or its error."""
    future: Future[str] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as exc:
            future.set_exception(exc)

    threading.Thread(target=run, name="hash", daemon=True).start()
    return future
