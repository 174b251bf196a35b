"""Unpacked archives in a cache: each in a folder named by the archive's sha256.

A folder is on trial until a model was loaded from it:

    <cache>/<sha256>          the files of an archive
    <cache>/<sha256>.trial    present while the folder is on trial, and locked by each process that tries it
    <cache>/.unpacking-*      a folder that is being written
    <cache>/.lock             held by the process that changes any of these

A folder whose model is refused, even in the last step of loading, is removed at once. A folder that a killed
process had on trial is removed at the next start.
"""

import fcntl
import hashlib
import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from musicgen_svc.checkpoints.archives import MAX_UNPACKED_BYTES, UNFINISHED_PREFIX, unpack
from musicgen_svc.errors import WeightsError
from musicgen_svc.runtime.file_lock import locked

_LOCK = ".lock"
_TRIAL = ".trial"


class UnpackedArchive:
    """The folder of an archive's files."""

    def __init__(self, archive: Path, folder: Path, trial: IO[bytes] | None) -> None:
        """Represents a folder that exists.

        Args:
            trial: the folder's open trial file, locked together with others who try the same folder.
                None: a model was loaded from the folder before.
        """
        self.archive, self.folder = archive, folder
        self._trial = trial
        if trial is not None:
            # If neither `accept` nor `refuse` is called, the next start removes the folder.
            weakref.finalize(self, trial.close)

    def accept(self) -> None:
        """Keeps the folder, because a model was loaded from it. Idempotent."""
        if self._trial is not None:
            with suppress(OSError):
                _trial_file(self.folder).unlink(missing_ok=True)
            self._release()

    def refuse(self) -> None:
        """Removes the folder, unless a model was loaded from it or another process tries it. Idempotent."""
        if self._trial is not None:
            self._release()
            with suppress(OSError), locked(self.folder.parent / _LOCK):
                _remove_untried(_trial_file(self.folder))

    @contextmanager
    def trying(self) -> Iterator[None]:
        """Context manager that refuses the folder if its body fails. The error then names the archive."""
        try:
            yield
        except WeightsError as exc:
            self.refuse()
            raise exc.renamed(self.folder, self.archive) from exc
        except BaseException:
            self.refuse()
            raise

    def _release(self) -> None:
        assert self._trial is not None
        self._trial.close()
        self._trial = None


def unpack_once(archive: Path, cache: Path, limit_bytes: int = MAX_UNPACKED_BYTES) -> UnpackedArchive:
    """The folder of an archive's files in `cache`. Unpacks the archive if the folder is not there yet.

    Raises:
        WeightsError: as `unpack`, or `cache` cannot be written. In both cases no file of the archive is left.
    """
    try:
        with archive.open("rb") as file:
            folder = cache / hashlib.file_digest(file, "sha256").hexdigest()
        if folder.is_dir() and not _trial_file(folder).exists():
            return UnpackedArchive(archive, folder, None)
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache / _LOCK) as held:  # while we hold it, no living process writes unfinished folders
            if held:
                _remove_leftovers(cache, keep=folder)
            if folder.is_dir() and not _trial_file(folder).exists():
                return UnpackedArchive(archive, folder, None)
            trial = _trial_file(folder).open("ab")
            _try_lock(trial, fcntl.LOCK_SH)
            result = UnpackedArchive(archive, folder, trial)
            if not folder.is_dir():
                try:
                    unpack(archive, folder, limit_bytes)
                except BaseException:
                    trial.close()
                    _trial_file(folder).unlink()
                    raise
            return result
    except OSError as exc:
        raise WeightsError(
            f"{archive} cannot be unpacked in {cache} ({exc.strerror}): check that folder."
        ) from exc


def remove_leftovers(cache: Path) -> None:
    """Removes what interrupted unpackings and trials left in `cache`, unless another process uses it."""
    if not any(any(cache.glob(pattern)) for pattern in (f"{UNFINISHED_PREFIX}*", f"*{_TRIAL}")):
        return
    # The cache may be read-only, or in use by another process.
    with suppress(OSError), locked(cache / _LOCK, wait=False) as held:
        if held:
            _remove_leftovers(cache)


def _trial_file(folder: Path) -> Path:
    return folder.with_name(folder.name + _TRIAL)


def _remove_leftovers(cache: Path, keep: Path | None = None) -> None:
    """Removes leftovers, except for the folder `keep`. The caller holds the cache's lock."""
    for unfinished in cache.glob(f"{UNFINISHED_PREFIX}*"):
        shutil.rmtree(unfinished, ignore_errors=True)
    for trial in cache.glob(f"*{_TRIAL}"):
        if keep is None or trial != _trial_file(keep):
            _remove_untried(trial)


def _remove_untried(trial: Path) -> None:
    """Removes a folder on trial, unless a process tries it. The caller holds the cache's lock."""
    with suppress(OSError), trial.open("rb") as file:  # another process may have accepted the folder
        if _try_lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
            shutil.rmtree(trial.with_suffix(""), ignore_errors=True)
            trial.unlink()


def _try_lock(file: IO[bytes], operation: int) -> bool:
    """Locks a file. False: another process holds it. True too if the file system has no locks at all."""
    try:
        fcntl.flock(file, operation)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
