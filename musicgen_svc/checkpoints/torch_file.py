"""Models in files of one state dict each, whichever tool wrote them: told apart by what is inside.

They are torch.save files, and for a bare state dict safetensors too.
"""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from musicgen_svc.checkpoints.archives import is_archive
from musicgen_svc.checkpoints.audiocraft_export import find as find_export
from musicgen_svc.checkpoints.audiocraft_export import find_pointer
from musicgen_svc.checkpoints.bare import find as find_bare
from musicgen_svc.checkpoints.base import Checkpoint, CodecPointer, OpenedCheckpoint, component_name
from musicgen_svc.checkpoints.cog_trainer import find as find_cog_trainer
from musicgen_svc.checkpoints.damage import check_not_damaged, damaged, is_there, looks_like_safetensors
from musicgen_svc.checkpoints.dora import find as find_dora
from musicgen_svc.checkpoints.lightning import find as find_lightning
from musicgen_svc.checkpoints.tensor_files import read_safetensors
from musicgen_svc.checkpoints.torch_packages import Found, as_codec, as_lm
from musicgen_svc.checkpoints.unpickle import begins_like_torch_file, is_torch_file, load_pickle
from musicgen_svc.errors import DamagedFileError, WeightsError

EXPORT_LM, EXPORT_CODEC = "state_dict.bin", "compression_state_dict.bin"
"""What audiocraft's export, and nothing else, calls its files."""
_SUFFIXES = {".bin", ".th", ".pt", ".pth", ".ckpt", ".tar", ".safetensors"}
_FINDERS = (find_export, find_dora, find_cog_trainer, find_lightning, find_bare)
_PRETRAINED = "//pretrained/"


@dataclass(frozen=True)
class Contents:
    """What is known of the torch.save and safetensors files in a folder."""

    folder: Path
    found: dict[Path, Found | CodecPointer]
    error: WeightsError | None
    """Of a file that is not read, a damaged one before another tool's pickle; nothing if all is found."""

    def lm(self) -> "TorchFile | None":
        """
        Raises:
            WeightsError: there are several.
        """
        lms = {file: model for file, model in self.found.items() if isinstance(model, Found) and model.is_lm}
        if len(lms) > 1:
            names = ", ".join([file.name for file in lms][:4])
            raise WeightsError(
                f"{self.folder} holds {len(lms)} language models ({names}): name one of the files."
            )
        for file, model in lms.items():
            return TorchFile(file, model, self)
        return None

    def codec(self) -> Checkpoint | CodecPointer | None:
        """
        Raises:
            WeightsError: there are several, or none while one of the files cannot be read: it may be the one.
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
    """A language model in a torch.save file, or in a safetensors file."""

    def __init__(self, file: Path, found: Found, beside: Contents | None) -> None:
        """`beside`: the folder that was named, if it was not the file itself."""
        # The two files of an export belong together, whichever of the three was named.
        self.path = file.parent if beside or file.name == EXPORT_LM else file
        self.files = (file,)
        self.format = found.format
        self._lm = as_lm(found, file)
        self._beside = beside

    def config(self) -> DictConfig:
        return self._lm.config

    def lm(self) -> Checkpoint:
        return self._lm

    def codec(self) -> Checkpoint | CodecPointer:
        """The one in the same folder, else the one that the configuration names.

        A file that was named by itself may lie among unrelated ones. It takes `compression_state_dict.bin`,
        unless that belongs to a `state_dict.bin` there, then its configuration's word, then any other.
        """
        file = self.files[0]
        named = self._lm.config.get("compression_model_checkpoint") or _PRETRAINED + "facebook/encodec_32khz"
        public = str(named).startswith(_PRETRAINED)
        if self._beside is None:
            if own := _codec_beside(file):
                return codec_in_file(own)
            if public:
                return CodecPointer(component_name(named))
        if codec := (self._beside or read_all(file.parent)).codec():
            return codec
        if public:
            return CodecPointer(component_name(named))
        raise WeightsError(
            f"{file} was trained with the codec {str(named)!r:.80}, which only its trainer has: "
            f"put the {EXPORT_CODEC} of that codec beside it."
        )


def open_file(file: Path) -> TorchFile:
    """
    Raises:
        WeightsError: the file cannot be read safely, or is nothing that is known.
    """
    found = _find(_package(file))
    if not isinstance(found, Found) or not found.is_lm:
        what = "a codec" if found else "none of them"
        raise WeightsError(
            f"{file} is {what}; a MusicGen in a single file is an audiocraft export, a dora checkpoint, "
            "a Cog trainer's file, a Lightning checkpoint or a bare state dict."
        )
    return TorchFile(file, found, None)


def codec_in_file(file: Path) -> Checkpoint | CodecPointer:
    """
    Raises:
        WeightsError: the file cannot be read safely, or is no codec.
    """
    found = _find(load_pickle(file))
    if isinstance(found, CodecPointer):
        return found
    if found is None or not found.is_codec:
        raise WeightsError(f"{file} is no codec; it must be what audiocraft's export writes for one.")
    return as_codec(found, file)


def read_all(folder: Path) -> Contents:
    """What the files of a folder hold. One that cannot be read is an error only if nothing else is found."""
    found: dict[Path, Found | CodecPointer] = {}
    errors: list[WeightsError] = []
    entries = sorted(folder.iterdir())
    for file in entries:
        try:
            if _may_be_model(file) and (model := _find(_package(file))):
                found[file] = model
        except WeightsError as exc:
            errors.append(exc)
    errors.sort(key=lambda exc: isinstance(exc, DamagedFileError))
    if not (found or errors):  # then a folder with a model's name is one that an unpacking tool put there
        errors = [
            damaged(entry, "a file") for entry in entries if entry.is_dir() and entry.suffix in _SUFFIXES
        ]
    return Contents(folder, found, errors[-1] if errors else None)


def _may_be_model(file: Path) -> bool:
    """Whether a file is to be read: by its content, or because a damaged one has the name of a model's."""
    if file.is_dir():
        return file.name in (EXPORT_LM, EXPORT_CODEC)
    known = file.suffix in _SUFFIXES or begins_like_torch_file(file) or looks_like_safetensors(file)
    return known and not is_archive(file)


def _codec_beside(file: Path) -> Path | None:
    """`compression_state_dict.bin` beside a model, unless it belongs to another one there."""
    codec, owner = file.parent / EXPORT_CODEC, file.parent / EXPORT_LM
    return codec if is_there(codec) and (file == owner or not is_there(owner)) else None


def _package(file: Path) -> object:
    """What a file holds; of safetensors, tensors by name.

    Raises:
        WeightsError: it is damaged, or cannot be read safely.
    """
    check_not_damaged(file)
    if file.suffix == ".safetensors" or (not is_torch_file(file) and looks_like_safetensors(file)):
        return read_safetensors(file)
    return load_pickle(file)


def _find(package: object) -> Found | CodecPointer | None:
    if not isinstance(package, dict):
        return None
    for finder in _FINDERS:
        if found := finder(package):
            return found
    return find_pointer(package)
