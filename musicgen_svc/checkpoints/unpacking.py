"""Unpacked archives in a cache, each called by the sha256 of the archive, and on trial until its model loads.

    <cache>/<sha256>          the files of an archive
    <cache>/<sha256>.trial    there until a model was loaded from it; locked by whoever tries to
    <cache>/.unpacking-*      on its way
    <cache>/.lock             held by the process that changes any of these

What is refused, be it as the last step of loading, is removed at once; what a killed process had on trial, at
the next start.
"""

import fcntl
import hashlib
import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from musicgen_svc.checkpoints.archives import MAX_UNPACKED_BYTES, UNFINISHED, unpack
from musicgen_svc.errors import WeightsError
from musicgen_svc.runtime.file_lock import locked

_LOCK = ".lock"
_TRIAL = ".trial"


class Unpacked:
    """The folder of an archive's files."""

    def __init__(self, archive: Path, folder: Path, trial: IO[bytes] | None) -> None:
        """`trial`: its file, locked with others who try the same folder; None: it has loaded before."""
        self.archive, self.folder = archive, folder
        self._trial = trial
        if trial is not None:
            weakref.finalize(self, trial.close)  # not told how it went: the next start removes the folder

    def accept(self) -> None:
        """Keeps the folder: a model was loaded from it. Idempotent."""
        if self._trial is not None:
            with suppress(OSError):
                _trial_of(self.folder).unlink(missing_ok=True)
            self._release()

    def refuse(self) -> None:
        """Removes the folder, unless a model was loaded from it or another process tries to. Idempotent."""
        if self._trial is not None:
            self._release()
            with suppress(OSError), locked(self.folder.parent / _LOCK):
                _remove_refused(_trial_of(self.folder))

    @contextmanager
    def trying(self) -> Iterator[None]:
        """Refuses the folder if what is done within fails; the error then names the archive instead."""
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


def unpacked(archive: Path, cache: Path, limit_bytes: int = MAX_UNPACKED_BYTES) -> Unpacked:
    """The files of an archive in `cache`; unpacked if they are not there.

    Raises:
        WeightsError: as `unpack`, or `cache` cannot be written. Nothing of it is left on the disk then.
    """
    try:
        with archive.open("rb") as file:
            folder = cache / hashlib.file_digest(file, "sha256").hexdigest()
        if folder.is_dir() and not _trial_of(folder).exists():
            return Unpacked(archive, folder, None)
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache / _LOCK) as alone:  # one after the other: what is unfinished then is nobody's
            if alone:
                _remove_leftovers(cache, but=folder)
            if folder.is_dir() and not _trial_of(folder).exists():
                return Unpacked(archive, folder, None)
            trial = _trial_of(folder).open("ab")
            _lock(trial, fcntl.LOCK_SH)
            given = Unpacked(archive, folder, trial)
            if not folder.is_dir():
                try:
                    unpack(archive, folder, limit_bytes)
                except BaseException:
                    trial.close()
                    _trial_of(folder).unlink()
                    raise
            return given
    except OSError as exc:
        raise WeightsError(
            f"{archive} cannot be unpacked in {cache} ({exc.strerror}): check that folder."
        ) from exc


def sweep(cache: Path) -> None:
    """Removes what interrupted unpackings and trials left in `cache`, and no other process works on."""
    if not any(any(cache.glob(pattern)) for pattern in (f"{UNFINISHED}*", f"*{_TRIAL}")):
        return
    with suppress(OSError), locked(cache / _LOCK, wait=False) as alone:  # it may be another's, or read-only
        if alone:
            _remove_leftovers(cache)


def _trial_of(folder: Path) -> Path:
    return folder.with_name(folder.name + _TRIAL)


def _remove_leftovers(cache: Path, but: Path | None = None) -> None:
    for left in cache.glob(f"{UNFINISHED}*"):
        shutil.rmtree(left, ignore_errors=True)
    for trial in cache.glob(f"*{_TRIAL}"):
        if but is None or trial != _trial_of(but):
            _remove_refused(trial)


def _remove_refused(trial: Path) -> None:
    """Removes a folder on trial, if nobody tries it. The caller holds the cache's lock."""
    with suppress(OSError), trial.open("rb") as file:  # it may be gone: accepted by another process
        if _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
            shutil.rmtree(trial.with_suffix(""), ignore_errors=True)
            trial.unlink()


def _lock(file: IO[bytes], how: int) -> bool:
    """False: another process holds it. A file system without locks tells nothing of others."""
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
