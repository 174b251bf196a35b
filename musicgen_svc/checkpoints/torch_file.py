"""Models in torch.save files, whichever tool wrote them: told apart by what is inside."""

from dataclasses import dataclass
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


@dataclass(frozen=True)
class Contents:
    """What is known of the torch.save files in a folder."""

    folder: Path
    found: dict[Path, Found | CodecPointer]
    error: WeightsError | None
    """The last one: another tool's pickle need not matter."""

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
    """A language model in a torch.save file."""

    def __init__(self, file: Path, found: Found, beside: Contents | None) -> None:
        """`beside`: the folder that was named, if it was not the file itself."""
        self.path = beside.folder if beside else file
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

        A file that was named by itself, in a folder of unrelated ones, takes its configuration's word first.
        """
        named = self._lm.config.get("compression_model_checkpoint") or _PRETRAINED + "facebook/encodec_32khz"
        public = str(named).startswith(_PRETRAINED)
        if self._beside is None and public:
            return CodecPointer(component_name(named))
        if codec := (self._beside or read_all(self.files[0].parent)).codec():
            return codec
        if public:
            return CodecPointer(component_name(named))
        raise WeightsError(
            f"{self.files[0]} was trained with the codec {str(named)!r:.80}, which only its trainer has: "
            "put the compression_state_dict.bin of that codec beside it."
        )


def open_file(file: Path) -> TorchFile:
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
    return TorchFile(file, found, None)


def read_all(folder: Path) -> Contents:
    found, error = {}, None
    for file in sorted(folder.iterdir()):
        try:
            if file.is_file() and is_torch_file(file) and (model := _find(load_pickle(file))):
                found[file] = model
        except WeightsError as exc:
            error = exc
    return Contents(folder, found, error)


def _find(package: object) -> Found | CodecPointer | None:
    if not isinstance(package, dict):
        return None
    for finder in _FINDERS:
        if found := finder(package):
            return found
    return find_pointer(package)
