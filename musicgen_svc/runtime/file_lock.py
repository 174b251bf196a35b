"""A lock between processes that share a folder: it ends with the process that holds it."""

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NO_LOCKS = {errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS}


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Holds the lock at `path`, a file that stays there; gives whether it is held.

    It is not if the file system has no locks, or if another process or thread holds it and `wait` is false.

    Raises:
        OSError: the file cannot be written.
    """
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        except BlockingIOError:
            held = False
        except OSError as exc:
            if exc.errno not in _NO_LOCKS:
                raise
            held = False
        yield held
