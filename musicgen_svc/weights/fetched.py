"""The files of a URL's fetching, and the removal of those that nobody will go on with.

    <cache>/<sha256>              a file that has arrived, called by its content, whatever its URL says
    <cache>/<key>.json            what the URL gave last: its ETag, and which of these files
    <cache>/<key>.partial, .etag  on its way; goes on from there if the server still has the same file
    <cache>/<key>.lock            held by the process that fetches it

`key` is the sha256 of the URL, which may hold a secret and is written nowhere.
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
"""After so long without a byte a partial file of another URL is removed: nobody has started with it again."""


@dataclass(frozen=True)
class Place:
    """The files of one URL."""

    cache: Path
    key: str

    @classmethod
    def of(cls, cache: Path, url: str) -> "Place":
        return cls(cache, hashlib.sha256(url.encode()).hexdigest())

    @property
    def lock(self) -> Path:
        return self.cache / f"{self.key}.lock"

    @property
    def index(self) -> Path:
        return self.cache / f"{self.key}.json"

    @property
    def partial(self) -> Path:
        return self.cache / f"{self.key}.partial"

    @property
    def partial_etag(self) -> Path:
        return self.cache / f"{self.key}.etag"

    def known(self) -> tuple[Path, str] | None:
        """The file that the URL gave last, if it is whole, and its ETag or an empty text."""
        try:
            entry = json.loads(self.index.read_text())
            path = self.cache / str(entry["sha256"])
            if path.stat().st_size == entry["size"]:
                return path, str(entry["etag"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # fetched again
        return None

    def begun(self) -> tuple[int, str]:
        """How much has arrived, and of which version; nothing if it cannot be gone on with."""
        try:
            return self.partial.stat().st_size, self.partial_etag.read_text()
        except OSError:
            return 0, ""

    def begin(self, etag: str) -> None:
        self.forget()
        self.partial.touch()
        if etag:
            self.partial_etag.write_text(etag)

    def forget(self) -> None:
        for path in (self.partial_etag, self.partial):
            path.unlink(missing_ok=True)

    def finish(self) -> Path:
        """Gives what has arrived its name; before this nothing can mistake it for a checkpoint."""
        etag = self.partial_etag.read_text() if self.partial_etag.exists() else ""
        sha256, size = sha256_of(self.partial), self.partial.stat().st_size
        path = self.cache / sha256
        self.partial.replace(path)
        self.partial_etag.unlink(missing_ok=True)
        draft = self.index.with_suffix(".new")
        draft.write_text(json.dumps({"etag": etag, "sha256": sha256, "size": size}))
        draft.replace(self.index)
        return path


def sweep(cache: Path, but: Place | None = None) -> None:
    """Removes what failed or killed fetches left in `cache`, except what may still be gone on with.

    Args:
        but: whose own partial file stays, however old.
    """
    for partial in [*cache.glob("*.partial"), *cache.glob("*.new")]:
        place = Place(cache, partial.name.partition(".")[0])
        with suppress(OSError):  # another process removed it, or the folder is read-only
            if place == but or time.time() - partial.stat().st_mtime < ABANDONED_S:
                continue
            with locked(place.lock, wait=False) as alone:
                if alone:
                    place.forget()
                    partial.unlink(missing_ok=True)
