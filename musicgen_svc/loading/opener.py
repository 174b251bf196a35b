"""The opener: a model's name -> its opened checkpoint, whose tensors are not read yet."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from musicgen_svc.checkpoints import OpenedCheckpoint, open_checkpoint
from musicgen_svc.loading.file_hashes import FileState
from musicgen_svc.weights.paths import UNPACKED, Weights


class Opener:
    """Opens checkpoints by the names of models, and remembers the last one.

    A request first asks what its model can do and then asks for the model: it is opened once for both.
    """

    def __init__(self, weights: Weights, lora_strength: float) -> None:
        """Makes an opener.

        Args:
            weights: where the checkpoints are.
            lora_strength: the factor for the weights of adapters; 1: as they were trained.
        """
        self._weights = weights
        self._lora_strength = lora_strength
        self._last: tuple[str, tuple[FileState, ...], OpenedCheckpoint] | None = None

    def open(self, name: str) -> OpenedCheckpoint:
        """Opens the checkpoint of the model called `name`.

        Raises:
            WeightsError: it is absent, unsafe, no MusicGen or cannot be read.
        """
        if self._last is not None:
            last, files, opened = self._last
            if last == name and all(file.unchanged for file in files):
                return opened
        path = self._weights.model_path(name)
        opened = self.open_path(path)
        read = (*opened.files, path)  # the path may be that of an archive, whose files are elsewhere
        self._last = name, tuple(FileState.of(file) for file in read if file.is_file()), opened
        return opened

    @property
    def files(self) -> tuple[FileState, ...]:
        """The files of the checkpoint that is open, and its archive, as they were when it was opened."""
        assert self._last is not None
        return self._last[1]

    @contextmanager
    def loading(self, name: str) -> Iterator[OpenedCheckpoint]:
        """Opens the model called `name`, which is then loaded inside the context.

        What was unpacked from an archive is kept if loading succeeds, and removed if it fails.

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

    def read[T](self, name: str, question: Callable[[OpenedCheckpoint], T]) -> T:
        """Returns the answer to a question about the model called `name`, and loads nothing.

        What was unpacked from an archive is removed if the question fails.

        Raises:
            WeightsError: as `open`, or as the question.
        """
        opened = self.open(name)
        if opened.archive is None:
            return question(opened)
        with opened.archive.trying():
            return question(opened)

    def open_path(self, path: Path) -> OpenedCheckpoint:
        """Opens the checkpoint at a path, and does not remember it.

        Raises:
            WeightsError: as `open`.
        """
        return open_checkpoint(
            path,
            base=self._weights.base_path,
            strength=self._lora_strength,
            cache=self._weights.folder / UNPACKED,
        )

    def forget(self) -> None:
        """Forgets the last checkpoint, so that the tensors that it maps can be freed."""
        self._last = None
