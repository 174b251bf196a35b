"""Models in files of one state dict each: torch.save files and, for a bare state dict, safetensors files.

Which tool wrote a file is decided by its content, in `torch_packages.py`.
"""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from musicgen_svc.checkpoints.archives import is_archive
from musicgen_svc.checkpoints.base import Checkpoint, CodecPointer, OpenedCheckpoint, part_name
from musicgen_svc.checkpoints.damage import (
    check_not_damaged,
    damaged_error,
    looks_like_safetensors,
    name_exists,
)
from musicgen_svc.checkpoints.tensor_files import read_safetensors
from musicgen_svc.checkpoints.torch_packages import PackagedModel, as_codec, as_lm, find_model
from musicgen_svc.checkpoints.unpickle import begins_like_torch_file, is_torch_file, load_pickle
from musicgen_svc.errors import DamagedFileError, WeightsError

EXPORT_LM, EXPORT_CODEC = "state_dict.bin", "compression_state_dict.bin"
"""The names that audiocraft's export, and no other tool, gives its files."""
_SUFFIXES = {".bin", ".th", ".pt", ".pth", ".ckpt", ".tar", ".safetensors"}
_PRETRAINED = "//pretrained/"


@dataclass(frozen=True)
class FolderModels:
    """The models in the torch.save and safetensors files of a folder."""

    folder: Path
    found: dict[Path, PackagedModel | CodecPointer]
    error: WeightsError | None
    """The error of a file that could not be read, if there was one."""

    @classmethod
    def read(cls, folder: Path) -> "FolderModels":
        """Reads the files of a folder. The error of a file that cannot be read is kept, and not raised.

        Of several errors, that of a damaged file is kept rather than that of another tool's pickle.
        """
        found: dict[Path, PackagedModel | CodecPointer] = {}
        errors: list[WeightsError] = []
        entries = sorted(folder.iterdir())
        for file in entries:
            try:
                if _may_be_model(file) and (model := find_model(_read_package(file))):
                    found[file] = model
            except WeightsError as exc:
                errors.append(exc)
        errors.sort(key=lambda exc: isinstance(exc, DamagedFileError))
        if not (found or errors):
            # Some unpacking tools put a file into a folder with the file's name.
            errors = [
                damaged_error(entry, "a file")
                for entry in entries
                if entry.is_dir() and entry.suffix in _SUFFIXES
            ]
        return cls(folder, found, errors[-1] if errors else None)

    def lm(self) -> "TorchFile | None":
        """The language model; None if there is none.

        Raises:
            WeightsError: there are several.
        """
        lms = {
            file: model
            for file, model in self.found.items()
            if isinstance(model, PackagedModel) and model.is_lm
        }
        if len(lms) > 1:
            names = ", ".join([file.name for file in lms][:4])
            raise WeightsError(
                f"{self.folder} holds {len(lms)} language models ({names}): name one of the files."
            )
        for file, model in lms.items():
            return TorchFile(file, model, self)
        return None

    def codec(self) -> Checkpoint | CodecPointer | None:
        """The codec, or the pointer to one; None if there is neither.

        Raises:
            WeightsError: there are several, or there is none and a file that may be the codec cannot be read.
        """
        codecs = {
            file: model
            for file, model in self.found.items()
            if isinstance(model, CodecPointer) or model.is_codec
        }
        if len(codecs) > 1:
            names = ", ".join(file.name for file in codecs)
            raise WeightsError(f"{self.folder} holds {len(codecs)} codecs ({names}); it must hold one.")
        if self.error and not codecs:
            raise self.error
        for file, model in codecs.items():
            return model if isinstance(model, CodecPointer) else as_codec(model, file)
        return None


class TorchFile(OpenedCheckpoint):
    """A language model in a torch.save file or a safetensors file."""

    def __init__(self, file: Path, model: PackagedModel, folder: FolderModels | None) -> None:
        """Reads the configuration, and checks it against the tensors.

        Args:
            folder: the models of the file's folder, if the user named the folder; None for a named file.

        Raises:
            WeightsError: the file is not a MusicGen, or its configuration and tensors differ.
        """
        # An export is its folder, even if the user named one of the export's two files.
        self.path = file.parent if folder or file.name == EXPORT_LM else file
        self.files = (file,)
        self.format = model.format
        self._lm = as_lm(model, file)
        self._folder = folder

    def config(self) -> DictConfig:
        """The language model's configuration."""
        return self._lm.config

    def lm(self) -> Checkpoint:
        """The language model."""
        return self._lm

    def codec(self) -> Checkpoint | CodecPointer:
        """The codec in the same folder, else the one that the configuration names.

        A file that was named itself may lie among unrelated files. It takes, in this order: the
        `compression_state_dict.bin` beside it, unless that belongs to a `state_dict.bin` there; the public
        codec that its configuration names; the only codec in the folder.

        Raises:
            WeightsError: there is none of these, or it cannot be read.
        """
        file = self.files[0]
        named = self._lm.config.get("compression_model_checkpoint") or _PRETRAINED + "facebook/encodec_32khz"
        is_public = str(named).startswith(_PRETRAINED)
        if self._folder is None:
            if own := _codec_beside(file):
                return _read_codec(own)
            if is_public:
                return CodecPointer(part_name(named))
        if codec := (self._folder or FolderModels.read(file.parent)).codec():
            return codec
        if is_public:
            return CodecPointer(part_name(named))
        raise WeightsError(
            f"{file} was trained with the codec {str(named)!r:.80}, which only its trainer has: "
            f"put the {EXPORT_CODEC} of that codec beside it."
        )


def open_torch_file(file: Path) -> TorchFile:
    """Opens a file that the user named.

    Raises:
        WeightsError: the file cannot be read safely, or is not a MusicGen.
    """
    found = find_model(_read_package(file))
    if not isinstance(found, PackagedModel) or not found.is_lm:
        what = "a codec" if found else "none of them"
        raise WeightsError(
            f"{file} is {what}; a MusicGen in a single file is an audiocraft export, a dora checkpoint, "
            "a Cog trainer's file, a Lightning checkpoint or a bare state dict."
        )
    return TorchFile(file, found, None)


def _read_codec(file: Path) -> Checkpoint | CodecPointer:
    """The codec in a file, or the pointer to one.

    Raises:
        WeightsError: the file cannot be read safely, or is not a codec.
    """
    found = find_model(load_pickle(file))
    if isinstance(found, CodecPointer):
        return found
    if found is None or not found.is_codec:
        raise WeightsError(f"{file} is no codec; it must be what audiocraft's export writes for one.")
    return as_codec(found, file)


def _may_be_model(file: Path) -> bool:
    """Whether a file is to be read: its content, or its name in case it is damaged, may be a model's."""
    if file.is_dir():
        return file.name in (EXPORT_LM, EXPORT_CODEC)
    known = file.suffix in _SUFFIXES or begins_like_torch_file(file) or looks_like_safetensors(file)
    return known and not is_archive(file)


def _codec_beside(file: Path) -> Path | None:
    """The `compression_state_dict.bin` beside a model, unless it belongs to another model there."""
    codec, owner = file.parent / EXPORT_CODEC, file.parent / EXPORT_LM
    return codec if name_exists(codec) and (file == owner or not name_exists(owner)) else None


def _read_package(file: Path) -> object:
    """The content of a torch.save file, or the tensors of a safetensors file by name.

    Raises:
        WeightsError: the file is damaged, or cannot be read safely.
    """
    check_not_damaged(file)
    if file.suffix == ".safetensors" or (not is_torch_file(file) and looks_like_safetensors(file)):
        return read_safetensors(file)
    return load_pickle(file)
