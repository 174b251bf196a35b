"""What every format gives: a language model, its codec and, from some, a text encoder."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from musicgen_svc.checkpoints.unpacking import Unpacked
from musicgen_svc.errors import WeightsError


@dataclass(frozen=True)
class Checkpoint:
    """What a model is built from, in audiocraft's spelling."""

    config: DictConfig
    state: dict[str, torch.Tensor]
    origin: str = "The checkpoint"
    """Its format and path, for messages."""
    files: tuple[Path, ...] = ()
    """All that it was read from."""


@dataclass(frozen=True)
class CodecPointer:
    """A codec that lies elsewhere, in transformers' format."""

    name: str
    """Of the folder that holds it: the last part of its Hugging Face repository."""


@dataclass(frozen=True)
class TransformersPart:
    """A model of transformers that lies inside a checkpoint: EnCodec or T5's encoder."""

    config: dict[str, Any]
    """Of transformers' `EncodecConfig` or `T5Config`."""
    state: dict[str, torch.Tensor]
    """Of transformers' `EncodecModel` or `T5EncoderModel`, complete: it loads strictly."""
    origin: str
    files: tuple[Path, ...] = ()
    """All that it was read from."""


class OpenedCheckpoint(ABC):
    """A checkpoint on disk whose format is known. Tensors are mapped, and read when they are used."""

    format: str
    """What it is, as a message would say it: `audiocraft export`."""
    path: Path
    """The file or folder that it was opened from, after unpacking."""
    files: tuple[Path, ...]
    """The files that the language model is made of."""
    archive: Unpacked | None = None
    """Where its files came from, if that is an archive."""

    @abstractmethod
    def config(self) -> DictConfig:
        """The language model's configuration, without its tensors."""

    @abstractmethod
    def lm(self) -> Checkpoint:
        """The language model.

        Raises:
            WeightsError: its tensors are not those of a MusicGen.
        """

    @abstractmethod
    def codec(self) -> Checkpoint | CodecPointer | TransformersPart:
        """The codec, or where it is.

        Raises:
            WeightsError: the checkpoint names one that is not here and has no public name.
        """

    def text_encoder(self) -> TransformersPart | None:
        """T5, where the checkpoint brings its own weights; else the configuration names it."""
        return None


def component_name(name: object) -> str:
    """The last part of a repository's name, which a folder of weights is called by.

    Raises:
        WeightsError: it is no plain name. A checkpoint's configuration is a stranger's text.
    """
    last = str(name).rsplit("/", 1)[-1]
    if last.startswith(".") or not last or not all(c.isalnum() or c in "._-" for c in last):
        raise WeightsError(f"The checkpoint needs {str(name)!r:.80}, which is no name of a model.")
    return last


def some(names: list[str]) -> str:
    """How many tensors, and the first few: `1 tensor (a)`, `5 tensors (a, b, c, …)`."""
    count = f"{len(names)} tensor{'' if len(names) == 1 else 's'}"
    return f"{count} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
