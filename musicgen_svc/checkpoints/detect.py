"""Opens the checkpoint at a path, whatever tool wrote it."""

from collections.abc import Callable
from pathlib import Path

from musicgen_svc.checkpoints.archives import MAX_UNPACKED_BYTES, is_archive
from musicgen_svc.checkpoints.base import OpenedCheckpoint
from musicgen_svc.checkpoints.damage import name_exists, unreadable_fault
from musicgen_svc.checkpoints.lora import ADAPTER_CONFIG, ADAPTER_FILES, LoraFolder
from musicgen_svc.checkpoints.tensor_files import CONFIG, TRANSFORMERS_FILES, read_json
from musicgen_svc.checkpoints.torch_file import EXPORT_CODEC, EXPORT_LM, FolderModels, open_torch_file
from musicgen_svc.checkpoints.transformers_folder import MODEL_TYPES, TransformersFolder
from musicgen_svc.checkpoints.unpacking import unpack_once
from musicgen_svc.errors import WeightsError

_MAX_WRAPPING_FOLDERS = 8  # in an archive, around the checkpoint
BasePath = Callable[[str], Path]
"""The name of the model that an adapter was trained on -> the path of that model."""


def open_checkpoint(
    path: Path, *, base: BasePath | None = None, strength: float = 1.0,
    cache: Path | None = None, limit_bytes: int = MAX_UNPACKED_BYTES,
) -> OpenedCheckpoint:  # fmt: skip
    """Opens a file or folder, and decides on its format by what is inside.

    Args:
        base: finds the model that an adapter was trained on. None: adapters are refused.
        strength: of an adapter; 0 gives the base model, 1 the trained one.
        cache: the folder in which an archive is unpacked, once for each content. What was unpacked stays on
            trial until the result's `archive` is told whether loading succeeded.
        limit_bytes: the most that an archive may unpack to.

    Raises:
        WeightsError: there is no MusicGen at the path, or it is unsafe or cannot be read.
    """
    try:
        if not path.exists():
            raise WeightsError(f"{path} is missing.")
        if archive := _find_archive(path):
            if cache is None:
                raise WeightsError(
                    f"{archive} is an archive, and no folder to unpack it in is set: unpack it first."
                )
            unpacked = unpack_once(archive, cache, limit_bytes)
            with unpacked.trying():
                checkpoint = _open(_innermost(unpacked.folder), base, strength)
                checkpoint.archive = unpacked
            return checkpoint
        return _open(path, base, strength)
    except OSError as exc:
        fault = unreadable_fault(exc)
        raise WeightsError(f"{exc.filename or path} {fault.description}: {fault.remedy}.") from exc


def _open(path: Path, base: BasePath | None, strength: float) -> OpenedCheckpoint:
    """Opens a folder, a file, or the folder whose format the file belongs to."""
    if path.is_dir():
        return _open_folder(path, base, strength)
    folder = path.parent
    if _belongs_to(path, ADAPTER_FILES, ADAPTER_CONFIG):
        return _open_adapter(folder, base, strength)
    if _belongs_to(path, TRANSFORMERS_FILES, CONFIG) and _model_type(folder) in MODEL_TYPES:
        return TransformersFolder(folder)
    if path.name == EXPORT_CODEC and (folder / EXPORT_LM).exists():
        path = folder / EXPORT_LM
    return open_torch_file(path)


def _belongs_to(file: Path, tensor_files: tuple[str, ...], config: str) -> bool:
    """Whether a file is a folder format's configuration, or a tensor file, shard or index beside it."""
    if file.name == config:
        return True
    if not (file.parent / config).exists():
        return False
    stems = [name.partition(".")[0] for name in tensor_files]
    return file.name.startswith(tuple(f"{stem}{mark}" for stem in stems for mark in (".", "-")))


def _model_type(folder: Path) -> object:
    """The `model_type` of a transformers folder; None if the folder has no configuration."""
    config = folder / CONFIG
    return read_json(config).get("model_type") if name_exists(config) else None


def _open_folder(folder: Path, base: BasePath | None, strength: float) -> OpenedCheckpoint:
    """Opens a folder: an adapter, else the one torch file in it, else a transformers folder."""
    if name_exists(folder / ADAPTER_CONFIG):
        return _open_adapter(folder, base, strength)
    models = FolderModels.read(folder)
    if model := models.lm():
        return model
    model_type = _model_type(folder)
    if model_type in MODEL_TYPES:  # trainers leave pickles of their own in such a folder
        return TransformersFolder(folder)
    if models.error:
        raise models.error
    if not name_exists(folder / CONFIG):
        raise WeightsError(
            f"{folder} holds no MusicGen: an audiocraft export, a dora checkpoint, a Cog trainer's file, "
            "a Lightning checkpoint, a bare state dict, a transformers folder or a LoRA adapter is one."
        )
    expected = " or ".join(MODEL_TYPES)
    raise WeightsError(
        f"{folder} is a transformers folder of type {model_type!r:.40}; it must be {expected}."
    )


def _open_adapter(folder: Path, base: BasePath | None, strength: float) -> OpenedCheckpoint:
    """Opens an adapter together with its base model."""
    return LoraFolder(folder, lambda name: _open_base(name, folder, base), strength)


def _open_base(name: str, adapter: Path, base: BasePath | None) -> OpenedCheckpoint:
    """Opens the model that an adapter was trained on, which must not be an adapter."""
    if base is None:
        raise WeightsError(f"The LoRA adapter {adapter} needs {name!r:.80}, and no base models are known.")
    path = base(name)
    if (path / ADAPTER_CONFIG).exists():
        raise WeightsError(f"The LoRA adapter {adapter} needs {name!r:.80}, which is an adapter itself.")
    return _open(path, None, 1.0)


def _find_archive(path: Path) -> Path | None:
    """The path itself if it is an archive, or the archive that is alone in the folder."""
    if path.is_dir():
        entries = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
        path = entries[0] if len(entries) == 1 else path
    return path if path.is_file() and is_archive(path) else None


def _innermost(folder: Path) -> Path:
    """The first folder with several entries, or the file, inside folders that hold only one entry each.

    Archives often hold one folder, or one file.
    """
    for _ in range(_MAX_WRAPPING_FOLDERS):
        entries = list(folder.iterdir())
        if len(entries) != 1:
            break
        folder = entries[0]
        if folder.is_file():
            break
    return folder
