"""Names -> checkpoints in whatever format, opened: of their tensors nothing is read yet."""

from collections.abc import Sequence
from pathlib import Path

from musicgen_svc.checkpoints import OpenedCheckpoint, open_checkpoint
from musicgen_svc.contents import FileState
from musicgen_svc.weights import UNPACKED, Weights


class Opener:
    """The last one is remembered: a request first asks what its model can do, and then for the model."""

    def __init__(self, weights: Weights, lora_strength: float) -> None:
        self._weights = weights
        self._lora_strength = lora_strength
        self._last: tuple[str, Sequence[FileState], OpenedCheckpoint] | None = None

    def open(self, name: str) -> OpenedCheckpoint:
        """The checkpoint of the model called `name`.

        Raises:
            WeightsError: it is absent, unsafe, no MusicGen or cannot be read.
        """
        if self._last is not None:
            last, files, opened = self._last
            if last == name and all(file.stands for file in files):
                return opened
        opened = self.open_path(self._weights.model(name))
        self._last = name, [FileState.of(path) for path in opened.files], opened
        return opened

    def open_path(self, path: Path) -> OpenedCheckpoint:
        return open_checkpoint(
            path,
            base=self._weights.base,
            strength=self._lora_strength,
            cache=self._weights.folder / UNPACKED,
        )

    def forget(self) -> None:
        """Lets go of the last one, and of the tensors that it may map."""
        self._last = None
