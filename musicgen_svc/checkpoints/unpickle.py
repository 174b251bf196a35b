"""Reads torch.save files without running code that is in them."""

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

from musicgen_svc.checkpoints.damage import check_not_damaged, damaged_error
from musicgen_svc.checkpoints.pickle_scan import CostlyPickleError, scan_torch_file
from musicgen_svc.errors import WeightsError

_ALLOWED_TYPES = [
    DictConfig, ListConfig, AnyNode, Metadata, ContainerMetadata, defaultdict, dict, list, int, typing.Any,
]  # fmt: skip
"""The types in audiocraft's checkpoints besides tensors: those of OmegaConf's configurations."""

ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
"""The first bytes of torch.save's older layout: before version 1.6, and later on request."""


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
    """The content of a torch.save file, with its tensors mapped from disk.

    Raises:
        WeightsError: the file is missing or damaged, is not a torch.save file, names a type that is not
            allowed, or its pickle could take more time or memory than its size suggests. No code of the
            file has run in any of these cases.
    """
    check_not_damaged(path)
    try:
        zipped = _is_torch_zip(path)
        scan_torch_file(path, zipped=zipped)
        with torch.serialization.safe_globals(_ALLOWED_TYPES):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except CostlyPickleError as exc:
        raise WeightsError(f"{path} cannot be read as a PyTorch checkpoint: {exc}.") from exc
    except Exception as exc:  # torch.load raises whatever its zip, pickle or tensor reader raises
        # The rest of PyTorch's message is left out: it advises to read the file unsafely.
        named = re.search(r"GLOBAL (\S+)", str(exc)) if isinstance(exc, pickle.UnpicklingError) else None
        if named is None:
            raise damaged_error(path, "a PyTorch checkpoint") from exc
        raise WeightsError(
            f"{path} cannot be read as a PyTorch checkpoint: it holds {named[1]}, which is not read."
        ) from exc


def _is_torch_zip(path: Path) -> bool:
    """Whether it is a zip with one folder at the top that holds `data.pkl` and `version`.

    Any other zip is an archive of files.
    """
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
