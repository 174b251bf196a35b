"""Whether two paths hold the same bytes. A file is read once for as long as it stays as it is."""

import hashlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from musicgen_svc.weights.lock_file import sha256_of


@dataclass(frozen=True)
class FileState:
    """A file as it was at one time; another content has another size, time or place on the disk."""

    path: Path
    size: int
    modified_ns: int
    place: tuple[int, int]
    """Device and inode."""

    @classmethod
    def of(cls, path: Path) -> "FileState":
        found = path.stat()
        return cls(path.resolve(), found.st_size, found.st_mtime_ns, (found.st_dev, found.st_ino))

    def is_of_one_file_with(self, other: "FileState") -> bool:
        """The same file, under whatever name, and unchanged."""
        return (self.place, self.size, self.modified_ns) == (other.place, other.size, other.modified_ns)

    @property
    def stands(self) -> bool:
        try:
            return FileState.of(self.path) == self
        except OSError:
            return False


class Hashes:
    """The sha256 of files, remembered."""

    def __init__(self) -> None:
        self._known: dict[FileState, str] = {}

    def sha256(self, file: FileState) -> str | None:
        """None: the file is not as it was, and what it held cannot be said any more."""
        if file not in self._known:
            if not file.stands:
                return None
            self._known[file] = sha256_of(file.path)
        return self._known[file]

    def equal(self, some: Sequence[FileState], others: Sequence[FileState]) -> bool:
        """Whether they hold the same bytes, one by one in order. Only files of equal size are read."""
        if [file.size for file in some] != [file.size for file in others]:
            return False
        return all(self._equal(one, other) for one, other in zip(some, others, strict=True))

    def _equal(self, one: FileState, other: FileState) -> bool:
        if one.is_of_one_file_with(other):
            return True
        found = self.sha256(one)
        return found is not None and found == self.sha256(other)

    def content(self, files: Sequence[Path]) -> str:
        """sha256 of one file; of several, of their hashes in order."""
        states = [FileState.of(path) for path in files]
        hashes = [self.sha256(state) or sha256_of(state.path) for state in states]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()

    def content_later(self, files: Sequence[Path]) -> Future[str]:
        """`content`, in a thread beside whatever else there is to do: hashing a large model takes seconds."""
        return _in_background(lambda: self.content(files))


def _in_background(work: Callable[[], str]) -> Future[str]:
    future: Future[str] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as exc:
            future.set_exception(exc)

    threading.Thread(target=run, name="hash", daemon=True).start()
    return future
