"""The files that are kept of each URL, and the removal of those that no process will complete.

    <cache>/<sha256>              a complete file, named by its content
    <cache>/<key>.json            the URL's last complete file: its name, size and ETag
    <cache>/<key>.partial, .etag  a file that is not complete, and its version; the next fetch resumes it if
                                  the server still has that version
    <cache>/<key>.lock            held by the process that fetches the URL

`key` is the sha256 of the URL. The URL itself may hold a secret, and is written nowhere.
"""

import hashlib
import json
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from musicgen_svc.runtime.file_lock import locked
from musicgen_svc.weights.lock_file import sha256_of

ABANDONED_S = 24 * 3600.0
"""A partial file of another URL is removed when it has received nothing for so long."""


@dataclass(frozen=True)
class CacheEntry:
    """The files of one URL."""

    cache: Path
    key: str

    @classmethod
    def of(cls, cache: Path, url: str) -> "CacheEntry":
        """The entry of a URL."""
        return cls(cache, hashlib.sha256(url.encode()).hexdigest())

    @property
    def lock(self) -> Path:
        """The lock file."""
        return self.cache / f"{self.key}.lock"

    @property
    def index(self) -> Path:
        """The record of the last complete file."""
        return self.cache / f"{self.key}.json"

    @property
    def partial(self) -> Path:
        """The file that is not complete."""
        return self.cache / f"{self.key}.partial"

    @property
    def partial_etag(self) -> Path:
        """The file that holds the ETag of the partial file."""
        return self.cache / f"{self.key}.etag"

    def complete_file(self) -> tuple[Path, str] | None:
        """The last complete file, and its ETag or an empty text; None if it is missing or damaged."""
        try:
            record = json.loads(self.index.read_text())
            path = self.cache / str(record["sha256"])
            if path.stat().st_size == record["size"]:
                return path, str(record["etag"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # the caller fetches the file again
        return None

    def partial_state(self) -> tuple[int, str]:
        """The bytes of the partial file, and its ETag; 0 and an empty text if it cannot be resumed."""
        try:
            return self.partial.stat().st_size, self.partial_etag.read_text()
        except OSError:
            return 0, ""

    def start_partial(self, etag: str) -> None:
        """Creates an empty partial file; with an empty `etag` it will not be resumed."""
        self.remove_partial()
        self.partial.touch()
        if etag:
            self.partial_etag.write_text(etag)

    def remove_partial(self) -> None:
        """Removes the partial file and its ETag."""
        for path in (self.partial_etag, self.partial):
            path.unlink(missing_ok=True)

    def complete_partial(self) -> Path:
        """Renames the partial file to its sha256, records it and returns it.

        No file with the name of a sha256 exists before its content is complete.
        """
        etag = self.partial_etag.read_text() if self.partial_etag.exists() else ""
        sha256, size = sha256_of(self.partial), self.partial.stat().st_size
        path = self.cache / sha256
        self.partial.replace(path)
        self.partial_etag.unlink(missing_ok=True)
        temporary = self.index.with_suffix(".new")
        temporary.write_text(json.dumps({"etag": etag, "sha256": sha256, "size": size}))
        temporary.replace(self.index)
        return path


def remove_leftovers(cache: Path, keep: CacheEntry | None = None) -> None:
    """Removes what failed or killed fetches left in `cache`, except for recent files and those in use.

    Args:
        keep: the entry whose partial file stays, however old.
    """
    for partial in [*cache.glob("*.partial"), *cache.glob("*.new")]:
        entry = CacheEntry(cache, partial.name.partition(".")[0])
        with suppress(OSError):  # another process removed it, or the folder is read-only
            if entry == keep or time.time() - partial.stat().st_mtime < ABANDONED_S:
                continue
            with locked(entry.lock, wait=False) as held:
                if held:
                    entry.remove_partial()
                    partial.unlink(missing_ok=True)
