"""A path -> the checkpoint there, whatever tool wrote it."""

from collections.abc import Callable
from pathlib import Path

from musicgen_svc.checkpoints.archives import MAX_UNPACKED_BYTES, is_archive
from musicgen_svc.checkpoints.base import OpenedCheckpoint
from musicgen_svc.checkpoints.damage import is_there
from musicgen_svc.checkpoints.lora import ADAPTER_CONFIG, ADAPTER_FILES, LoraFolder
from musicgen_svc.checkpoints.tensor_files import CONFIG, TRANSFORMERS_FILES, read_json
from musicgen_svc.checkpoints.torch_file import EXPORT_CODEC, EXPORT_LM, open_file, read_all
from musicgen_svc.checkpoints.transformers_folder import MODEL_TYPES, TransformersFolder
from musicgen_svc.checkpoints.unpacking import unpacked
from musicgen_svc.errors import WeightsError

_MAX_DEPTH = 8  # of folders around the one that matters, in an archive


def open_checkpoint(
    path: Path, *, base: Callable[[str], Path] | None = None, strength: float = 1.0,
    cache: Path | None = None, limit_bytes: int = MAX_UNPACKED_BYTES,
) -> OpenedCheckpoint:  # fmt: skip
    """Opens a file or folder by what is inside.

    Args:
        base: the model's name that an adapter was trained on -> where it lies.
        strength: of an adapter; 0 is the base, 1 what was trained.
        cache: the folder in which an archive is unpacked, once for each content. What is in it is on trial
            until `archive` of what is returned is told how loading it went.
        limit_bytes: the most that an archive may unpack to.

    Raises:
        WeightsError: nothing there is a MusicGen, or it is unsafe or cannot be read.
    """
    try:
        if not path.exists():
            raise WeightsError(f"{path} is missing.")
        if archive := _archive_at(path):
            if cache is None:
                raise WeightsError(
                    f"{archive} is an archive, and no folder to unpack it in is set: unpack it first."
                )
            inside = unpacked(archive, cache, limit_bytes)
            with inside.trying():
                opened = _open(_heart(inside.folder), base, strength)
                opened.archive = inside
            return opened
        return _open(path, base, strength)
    except OSError as exc:
        raise WeightsError(f"{exc.filename or path} cannot be read: {exc.strerror or exc}.") from exc


def _open(path: Path, base: Callable[[str], Path] | None, strength: float) -> OpenedCheckpoint:
    """Opens a folder, a file, or the folder that a file is a part of by its name and what lies beside it."""
    if path.is_dir():
        return _open_folder(path, base, strength)
    folder = path.parent
    if _is_part(path, ADAPTER_FILES, ADAPTER_CONFIG):
        return _open_adapter(folder, base, strength)
    if _is_part(path, TRANSFORMERS_FILES, CONFIG) and _model_type(folder) in MODEL_TYPES:
        return TransformersFolder(folder)
    if path.name == EXPORT_CODEC and (folder / EXPORT_LM).exists():
        path = folder / EXPORT_LM
    return open_file(path)


def _is_part(file: Path, stems: tuple[str, ...], config: str) -> bool:
    """Whether the file is that configuration, or one of those tensor files, a shard or an index beside it."""
    if file.name == config:
        return True
    if not (file.parent / config).exists():
        return False
    bases = [stem.partition(".")[0] for stem in stems]
    return file.name.startswith(tuple(f"{base}{mark}" for base in bases for mark in (".", "-")))


def _model_type(folder: Path) -> object:
    """Of a transformers folder. None: there is no configuration."""
    config = folder / CONFIG
    return read_json(config).get("model_type") if is_there(config) else None


def _open_adapter(folder: Path, base: Callable[[str], Path] | None, strength: float) -> OpenedCheckpoint:
    return LoraFolder(folder, lambda name: _open_base(name, folder, base), strength)


def _open_folder(folder: Path, base: Callable[[str], Path] | None, strength: float) -> OpenedCheckpoint:
    if is_there(folder / ADAPTER_CONFIG):
        return _open_adapter(folder, base, strength)
    contents = read_all(folder)
    if model := contents.lm():
        return model
    kind = _model_type(folder)
    if kind in MODEL_TYPES:  # beside which trainers leave pickles of their own
        return TransformersFolder(folder)
    if contents.error:
        raise contents.error
    if not is_there(folder / CONFIG):
        raise WeightsError(
            f"{folder} holds no MusicGen: an audiocraft export, a dora checkpoint, a Cog trainer's file, "
            "a Lightning checkpoint, a bare state dict, a transformers folder or a LoRA adapter is one."
        )
    wanted = " or ".join(MODEL_TYPES)
    raise WeightsError(f"{folder} is a transformers folder of type {kind!r:.40}; it must be {wanted}.")


def _open_base(name: str, adapter: Path, base: Callable[[str], Path] | None) -> OpenedCheckpoint:
    if base is None:
        raise WeightsError(f"The LoRA adapter {adapter} needs {name!r:.80}, and no base models are known.")
    path = base(name)
    if (path / ADAPTER_CONFIG).exists():
        raise WeightsError(f"The LoRA adapter {adapter} needs {name!r:.80}, which is an adapter itself.")
    return _open(path, None, 1.0)


def _archive_at(path: Path) -> Path | None:
    """The archive that the path is, or that lies alone in that folder."""
    if path.is_dir():
        entries = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
        path = entries[0] if len(entries) == 1 else path
    return path if path.is_file() and is_archive(path) else None


def _heart(folder: Path) -> Path:
    """Goes down while there is nothing but one entry: archives often hold a folder, or one file."""
    for _ in range(_MAX_DEPTH):
        entries = list(folder.iterdir())
        if len(entries) != 1:
            break
        folder = entries[0]
        if folder.is_file():
            break
    return folder
