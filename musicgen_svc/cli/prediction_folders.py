"""Removes the folders that Cog makes: one for each prediction, named after its id. Cog removes none."""

import shutil
import tempfile
from collections import Counter
from pathlib import Path

from musicgen_svc.cli.reaper import Reaper

COG_FOLDER = Path("/tmp/coglet/predictions")
"""The path is fixed in Cog 0.23.1; TMPDIR does not change it."""


class UnusableFolderError(Exception):
    """Cog cannot make its folders, so that each prediction would occupy one of its places for ever."""


def check(root: Path = COG_FOLDER) -> None:
    """Checks that Cog can make its folders.

    Raises:
        UnusableFolderError: the folder belongs to another user, or the disk is full.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root):
            pass
    except OSError as error:
        raise UnusableFolderError(
            f"Cog cannot write to {root} ({error.strerror or error}), which it must: remove it, or "
            "have its owner do so."
        ) from None


class PredictionFolders:
    """Removes a prediction's folder when Cog has ended the prediction and no request with its id is open.

    Cog reads a prediction's outputs before it logs that the prediction has ended. A second prediction may
    have the same id, but only after the first has ended.
    """

    def __init__(self, reaper: Reaper, root: Path = COG_FOLDER) -> None:
        self._reaper = reaper
        self._root = root
        self._running: set[str] = set()
        self._ended: set[str] = set()
        self._requests: Counter[str] = Counter()

    def requested(self, id: str) -> None:
        """Notes that a request with this id is sent to Cog."""
        self._requests[id] += 1

    def answered(self, id: str) -> None:
        """Notes that this request was answered, or that its client has closed the connection."""
        self._requests[id] -= 1
        if not self._requests[id]:
            del self._requests[id]
        self._clear(id)

    def started(self, id: str) -> None:
        """Notes that Cog has started a prediction, and will make its folder."""
        self._running.add(id)
        if (folder := self._folder(id)) is not None:
            self._reaper.watch_folder(folder)

    def finished(self, id: str) -> None:
        """Notes that Cog has ended a prediction."""
        self._running.discard(id)
        self._ended.add(id)
        self._clear(id)

    def runs(self, id: str | None) -> bool:
        """Whether Cog runs a prediction with this id."""
        return id in self._running

    def clear(self) -> None:
        """Removes all folders that are left, after Cog has ended."""
        for id in self._running | self._ended:
            self._remove(id)
        self._running.clear()
        self._ended.clear()

    def _clear(self, id: str) -> None:
        """Removes a prediction's folder if nothing needs it."""
        if id not in self._ended or id in self._running or id in self._requests:
            return
        self._ended.discard(id)
        self._remove(id)

    def _remove(self, id: str) -> None:
        if (folder := self._folder(id)) is not None:
            shutil.rmtree(folder, ignore_errors=True)
            self._reaper.forget_folder(folder)

    def _folder(self, id: str) -> Path | None:
        """The prediction's folder. None: the id is a path to elsewhere, which the gate would refuse."""
        folder = self._root / id
        return folder if folder.parent == self._root and folder.name not in ("", "..") else None
