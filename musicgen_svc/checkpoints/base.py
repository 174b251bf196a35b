"""What every format provides: a language model, its codec and, from some formats, a text encoder."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from musicgen_svc.checkpoints.unpacking import UnpackedArchive
from musicgen_svc.errors import WeightsError


@dataclass(frozen=True)
class Checkpoint:
    """What a model is built from, with audiocraft's names."""

    config: DictConfig
    state: dict[str, torch.Tensor]
    origin: str = "The checkpoint"
    """Its format and path, for messages."""
    files: tuple[Path, ...] = ()
    """All files that it was read from."""


@dataclass(frozen=True)
class CodecPointer:
    """The name of a codec that lies in a folder of its own, in transformers' format."""

    name: str
    """The folder's name: the last part of the codec's Hugging Face repository."""


@dataclass(frozen=True)
class TransformersPart:
    """A model of transformers that lies inside a checkpoint: EnCodec or T5's encoder."""

    config: dict[str, Any]
    """The fields of transformers' `EncodecConfig` or `T5Config`."""
    state: dict[str, torch.Tensor]
    """The state dict of transformers' `EncodecModel` or `T5EncoderModel`, complete: it loads strictly."""
    origin: str
    """The checkpoint's format and path, for messages."""
    files: tuple[Path, ...] = ()
    """All files that it was read from."""


class OpenedCheckpoint(ABC):
    """A checkpoint on disk whose format is known. Its tensors are mapped, and are read when they are used."""

    format: str
    """The format's name in messages: `audiocraft export`."""
    path: Path
    """The file or folder that it was opened from, after unpacking."""
    files: tuple[Path, ...]
    """The files that the language model is made of."""
    archive: UnpackedArchive | None = None
    """The unpacked archive that holds its files, if they came from an archive."""

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
        """The codec, or the name of the codec's folder.

        Raises:
            WeightsError: the checkpoint names a codec that is not here and has no public name.
        """

    def text_encoder(self) -> TransformersPart | None:
        """T5, if the checkpoint holds T5's weights. None: its configuration names a T5."""
        return None


def part_name(name: object) -> str:
    """The last part of a repository's name, which is also the name of the folder of its weights.

    Raises:
        WeightsError: it is not a plain name. The name comes from a checkpoint that nobody has vetted.
    """
    last = str(name).rsplit("/", 1)[-1]
    if last.startswith(".") or not last or not all(c.isalnum() or c in "._-" for c in last):
        raise WeightsError(f"The checkpoint needs {str(name)!r:.80}, which is no name of a model.")
    return last
