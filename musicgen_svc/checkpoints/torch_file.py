"""Models in torch.save files, whichever tool wrote them: told apart by what is inside."""

from pathlib import Path

from omegaconf import DictConfig

from musicgen_svc.checkpoints.audiocraft_export import find as find_export
from musicgen_svc.checkpoints.audiocraft_export import find_pointer
from musicgen_svc.checkpoints.bare import find as find_bare
from musicgen_svc.checkpoints.cog_trainer import find as find_cog_trainer
from musicgen_svc.checkpoints.dora import find as find_dora
from musicgen_svc.checkpoints.lightning import find as find_lightning
from musicgen_svc.checkpoints.opened import Checkpoint, CodecPointer, OpenedCheckpoint, component_name
from musicgen_svc.checkpoints.packages import Found, as_codec, as_lm
from musicgen_svc.checkpoints.unpickle import is_torch_file, load_pickle
from musicgen_svc.errors import WeightsError

_FINDERS = (find_export, find_dora, find_cog_trainer, find_lightning, find_bare)
_PRETRAINED = "//pretrained/"


class TorchFile(OpenedCheckpoint):
    """A language model in a torch.save file."""

    def __init__(self, file: Path, lm: Checkpoint, found: Found, beside: Path | None) -> None:
        """`beside`: the folder that was named, if it was not the file itself."""
        self.path = beside or file
        self.files = (file,)
        self.format = found.format
        self._lm = lm
        self._beside = beside

    def config(self) -> DictConfig:
        return self._lm.config

    def lm(self) -> Checkpoint:
        return self._lm

    def codec(self) -> Checkpoint | CodecPointer:
        """The one in the same folder, else the one that the configuration names.

        A file that was named by itself, in a folder of unrelated ones, takes its configuration's word first.
        """
        named = self._lm.config.get("compression_model_checkpoint") or _PRETRAINED + "facebook/encodec_32khz"
        public = str(named).startswith(_PRETRAINED)
        if self._beside is None and public:
            return CodecPointer(component_name(named))
        if codec := _codec_in(self.files[0].parent):
            return codec
        if public:
            return CodecPointer(component_name(named))
        raise WeightsError(
            f"{self.files[0]} was trained with the codec {str(named)!r:.80}, which only its trainer has: "
            "put the compression_state_dict.bin of that codec beside it."
        )


def open_file(file: Path, beside: Path | None = None) -> TorchFile:
    """
    Raises:
        WeightsError: the file cannot be read safely, or is nothing that is known.
    """
    found = _find(load_pickle(file))
    if not isinstance(found, Found) or not found.is_lm:
        what = "a codec" if found else "none of them"
        raise WeightsError(
            f"{file} is {what}; a MusicGen in a torch.save file is an audiocraft export, a dora checkpoint, "
            "a Cog trainer's file, a Lightning checkpoint or a bare state dict."
        )
    return TorchFile(file, as_lm(found, f"The {found.format} {file}"), found, beside)


def lm_files(folder: Path) -> list[Path]:
    """The files in a folder that hold a language model.

    Raises:
        WeightsError: there is none, and one of its torch.save files cannot be read.
    """
    found, error = _read_all(folder)
    files = [file for file, model in found.items() if isinstance(model, Found) and model.is_lm]
    if error and not files:
        raise error
    return files


def _codec_in(folder: Path) -> Checkpoint | CodecPointer | None:
    """
    Raises:
        WeightsError: there are several, or none while one of the files cannot be read: it may be the one.
    """
    found, error = _read_all(folder)
    codecs = {
        file: model for file, model in found.items() if isinstance(model, CodecPointer) or model.is_codec
    }
    if len(codecs) > 1:
        names = ", ".join(file.name for file in codecs)
        raise WeightsError(f"{folder} holds {len(codecs)} codecs ({names}); it must hold one.")
    if error and not codecs:
        raise error
    for file, model in codecs.items():
        return model if isinstance(model, CodecPointer) else as_codec(model, f"The {model.format} {file}")
    return None


def _read_all(folder: Path) -> tuple[dict[Path, Found | CodecPointer], WeightsError | None]:
    """What is known of the files in a folder, and the last error: another tool's pickle need not matter."""
    found, error = {}, None
    for file in sorted(folder.iterdir()):
        try:
            if file.is_file() and is_torch_file(file) and (model := _find(load_pickle(file))):
                found[file] = model
        except WeightsError as exc:
            error = exc
    return found, error


def _find(package: object) -> Found | CodecPointer | None:
    if not isinstance(package, dict):
        return None
    for finder in _FINDERS:
        if found := finder(package):
            return found
    return find_pointer(package)
