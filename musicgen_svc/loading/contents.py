"""Which files a request's model and parts are read from, and their hashes. Loads no model."""

from collections.abc import Callable
from pathlib import Path

import torch
from omegaconf import DictConfig

from musicgen_svc.checkpoints import OpenedCheckpoint
from musicgen_svc.loading import parts
from musicgen_svc.loading.file_hashes import FileState, Hashes
from musicgen_svc.loading.opener import Opener
from musicgen_svc.weights.catalog import DIFFUSION_FILE
from musicgen_svc.weights.paths import Weights

DIFFUSION = "multiband-diffusion"

CODEC, TEXT, SEPARATOR, DECODER = "codec", "T5", "Demucs", "MultiBand Diffusion"
"""The parts that a request may need beside a language model."""

Files = tuple[tuple[Path, ...], tuple[Path, ...]]
"""The files of a language model, and those of parts."""

_Source = Callable[[OpenedCheckpoint, DictConfig], tuple[FileState, ...]]


class Contents:
    """Finds the files of models by name, and hashes them. Each file is read once."""

    def __init__(self, weights: Weights, opener: Opener, hashes: Hashes) -> None:
        """Makes it for the models in `weights`, which `opener` opens. `hashes`: remembers the hashes."""
        cpu = torch.device("cpu")  # of a part that is not built
        self._opener, self._hashes = opener, hashes
        self._sources: dict[str, _Source] = {
            CODEC: lambda opened, config: parts.codec_spec(weights, opened, config, cpu).files,
            TEXT: lambda opened, config: parts.text_spec(weights, opened, config, cpu).files,
            SEPARATOR: lambda opened, config: (
                parts.separator_spec(
                    weights.part_path(parts.DEMUCS, opened.path), config.get("sample_rate"), cpu
                ).files
            ),
            DECODER: lambda opened, _: (
                parts.diffusion_spec(weights.part_path(DIFFUSION, opened.path) / DIFFUSION_FILE, cpu).files
            ),
        }
        self._found: dict[tuple[str, tuple[str, ...]], tuple[tuple[FileState, ...], Files]] = {}

    def files(self, name: str, needed: tuple[str, ...]) -> Files:
        """Returns the files of the model called `name`, and those of the parts that are needed.

        Raises:
            WeightsError: the model or one of these parts is missing, or its files are damaged.
        """
        states, found = self._found.get((name, needed), ((), ((), ())))
        if not states or not all(state.unchanged for state in states):
            states, found = self._opener.read(name, lambda opened: self._read(opened, needed))
            self._opener.forget()  # its tensors may never be needed
            self._found[name, needed] = states, found
        return found

    def _read(self, opened: OpenedCheckpoint, needed: tuple[str, ...]) -> tuple[tuple[FileState, ...], Files]:
        """Finds the files of an opened checkpoint. Returns the states of all read files as well."""
        config = opened.config()
        of_parts = [state for part in needed for state in self._sources[part](opened, config)]
        found = tuple(opened.files), tuple(state.path for state in of_parts)
        return (*self._opener.files, *of_parts), found

    def sha256(self, files: tuple[Path, ...]) -> str:
        """Returns the sha256 of one file, or of the hashes of several files. The first time takes seconds."""
        return self._hashes.content(files)
