"""Names -> checkpoints in whatever format, opened: of their tensors nothing is read yet."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from musicgen_svc.checkpoints import OpenedCheckpoint, open_checkpoint
from musicgen_svc.loading.file_hashes import FileState
from musicgen_svc.weights.paths import UNPACKED, Weights

T = TypeVar("T")


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

    @contextmanager
    def trying(self, name: str) -> Iterator[OpenedCheckpoint]:
        """Opens the model called `name`, to load from it within.

        What was unpacked of an archive is removed if that fails, and is kept from then on if it does not.

        Raises:
            WeightsError: as `open`.
        """
        opened = self.open(name)
        with ExitStack() as trial:
            if opened.archive:
                trial.enter_context(opened.archive.trying())
            trial.callback(self.forget)
            yield opened
        if opened.archive:
            opened.archive.accept()

    def read(self, name: str, question: Callable[[OpenedCheckpoint], T]) -> T:
        """What a question about the model called `name` is answered; nothing is loaded from it yet.

        Raises:
            WeightsError: as `open`, or as the question.
        """
        opened = self.open(name)
        if opened.archive is None:
            return question(opened)
        with opened.archive.trying():
            return question(opened)

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
