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

from musicgen_svc.checkpoints.pickle_scan import scan_torch_file
from musicgen_svc.errors import WeightsError, first_line

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
        with path.open("rb") as file:
            if file.read(len(_LEGACY_MAGIC)) == _LEGACY_MAGIC:
                return True
        return _is_torch_zip(path)
    except OSError:
        return False


def load_pickle(path: Path) -> Any:
    """The content of a torch.save file, its tensors mapped from disk.

    Raises:
        WeightsError: the file is absent, is no torch.save file, or names a type that is not on the
            short list above, or its pickle makes more than its size tells; nothing of it has been run then.
    """
    if not path.is_file():
        raise WeightsError(f"{path} is missing.")
    try:
        mapped = _is_torch_zip(path)  # older files have no layout that could be mapped
        scan_torch_file(path, zipped=mapped)
        with torch.serialization.safe_globals(_ALLOWED):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as exc:  # torch.load raises whatever its zip, pickle or tensor reader raises
        raise WeightsError(f"{path} cannot be read as a PyTorch checkpoint: {_reason(exc)}") from exc


def _reason(exc: Exception) -> str:
    """Without PyTorch's advice, which is to read the file unsafely."""
    if not isinstance(exc, pickle.UnpicklingError):
        return first_line(exc)
    named = re.search(r"GLOBAL (\S+)", str(exc))
    return (
        f"it holds {named[1]}, which is not read." if named else "it is damaged, or holds more than tensors."
    )


def _is_torch_zip(path: Path) -> bool:
    """One folder at the top, `data.pkl` in it: any other zip is an archive of somebody's files."""
    with path.open("rb") as start:
        if start.read(len(ZIP_MAGIC)) != ZIP_MAGIC:
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
