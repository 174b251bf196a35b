"""A lock between processes that share a folder. It is released at the latest when its process ends."""

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NO_LOCKS = {errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS}


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Context manager that holds a lock, and yields whether it really holds it.

    It does not if the file system has no locks, or if another process or thread holds the lock and `wait` is
    false.

    Args:
        path: the lock's file, which is created and stays there.
        wait: whether to wait for another holder.

    Raises:
        OSError: the lock's file cannot be written.
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
