"""torch.save files, read without running what they carry."""

import pickle
import re
import typing
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig
from omegaconf.base import ContainerMetadata, Metadata
from omegaconf.nodes import AnyNode

from musicgen_svc.checkpoints.damage import check_not_damaged, damaged
from musicgen_svc.checkpoints.pickle_scan import Costly, scan_torch_file
from musicgen_svc.errors import WeightsError

_ALLOWED = [
    DictConfig, ListConfig, AnyNode, Metadata, ContainerMetadata, defaultdict, dict, list, int, typing.Any,
]  # fmt: skip
"""What audiocraft's checkpoints hold besides tensors: OmegaConf's view of their configuration."""

ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
"""The first bytes that torch.save wrote before version 1.6, or writes when asked not to zip."""


def is_torch_file(path: Path) -> bool:
    """Whether torch.save wrote the file: a zip of its own layout, or the pickle of older versions."""
    try:
        return _head(path) == _LEGACY_MAGIC or _is_torch_zip(path)
    except OSError:
        return False


def begins_like_torch_file(path: Path) -> bool:
    """Whether torch.save may have written the file's beginning, even if its end is lost."""
    try:
        return _head(path).startswith((_LEGACY_MAGIC, ZIP_MAGIC))
    except OSError:
        return False


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(len(_LEGACY_MAGIC))


def load_pickle(path: Path) -> Any:
    """The content of a torch.save file, its tensors mapped from disk.

    Raises:
        WeightsError: the file is absent or damaged, is no torch.save file, names a type that is not on the
            short list above, or its pickle makes more than its size tells. Nothing of it has been run then.
    """
    check_not_damaged(path)
    try:
        mapped = _is_torch_zip(path)  # older files have no layout that could be mapped
        scan_torch_file(path, zipped=mapped)
        with torch.serialization.safe_globals(_ALLOWED):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Costly as exc:
        raise WeightsError(f"{path} cannot be read as a PyTorch checkpoint: {exc}.") from exc
    except Exception as exc:  # torch.load raises whatever its zip, pickle or tensor reader raises
        # Nothing else of the message: PyTorch advises to read the file unsafely.
        named = re.search(r"GLOBAL (\S+)", str(exc)) if isinstance(exc, pickle.UnpicklingError) else None
        if named is None:
            raise damaged(path, "a PyTorch checkpoint") from exc
        raise WeightsError(
            f"{path} cannot be read as a PyTorch checkpoint: it holds {named[1]}, which is not read."
        ) from exc


def _is_torch_zip(path: Path) -> bool:
    """One folder at the top, `data.pkl` in it: any other zip is an archive of somebody's files."""
    if not _head(path).startswith(ZIP_MAGIC):
        return False
    try:
        with zipfile.ZipFile(path) as file:
            names = file.namelist()
    except zipfile.BadZipFile:
        return False
    root = names[0].split("/")[0] if names else ""
    return {f"{root}/data.pkl", f"{root}/version"} <= set(names) and all(
        name.startswith(f"{root}/") for name in names
    )
