"""Reads the JSON and tensors of transformers and PEFT: safetensors or torch.save, whole or in shards."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from musicgen_svc.checkpoints.damage import check_not_damaged, damaged_error, name_exists
from musicgen_svc.checkpoints.tensor_checks import check_stored
from musicgen_svc.checkpoints.unpickle import load_pickle
from musicgen_svc.errors import WeightsError

CONFIG = "config.json"
TRANSFORMERS_FILES = ("model.safetensors", "pytorch_model.bin")
"""The names that transformers gives a model's weights, the newer one first."""

_MAX_JSON_BYTES = 64 << 20


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        WeightsError: the file is missing, damaged, too large, or holds something else than a JSON object.
    """
    check_not_damaged(path)
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise WeightsError(f"{path} takes {path.stat().st_size} bytes, which no configuration does.")
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as exc:
        raise damaged_error(path, "JSON", f" (line {exc.lineno}, column {exc.colno})") from exc
    except (OSError, ValueError, RecursionError) as exc:
        raise damaged_error(path, "JSON") from exc
    if not isinstance(value, dict):
        raise WeightsError(f"{path} holds a {type(value).__name__}; it must hold a JSON object.")
    return value


def tensor_files(folder: Path, names: tuple[str, ...]) -> tuple[Path, ...]:
    """The files that hold a folder's tensors: one file, or the shards that an index names.

    Args:
        names: of a file without shards, in the order of preference: `model.safetensors`.

    Raises:
        WeightsError: there is none of them, one is damaged, or the index names a file that is missing or
            lies outside the folder.
    """
    for name in names:
        index = folder / f"{name}.index.json"
        if name_exists(index):
            return _shards(index)
        if name_exists(folder / name):
            check_not_damaged(folder / name)
            return (folder / name,)
    raise WeightsError(f"{folder} holds a configuration without its weights, {' or '.join(names)}.")


def read_tensors(files: tuple[Path, ...]) -> dict[str, torch.Tensor]:
    """All tensors of the files by name, mapped from disk.

    Raises:
        WeightsError: a file cannot be read, or holds something else than tensors.
    """
    state: dict[str, torch.Tensor] = {}
    for file in files:
        state |= read_safetensors(file) if file.suffix == ".safetensors" else _read_pickled(file)
    return state


def _shards(index: Path) -> tuple[Path, ...]:
    """The files that an index names, each of which is there and in the index's folder."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise WeightsError(f"{index} names no files: it has no weight_map.")
    files = []
    for name in sorted({str(name) for name in names.values()}):
        if name != Path(name).name or name in (".", ".."):
            raise WeightsError(f"{index} names {name!r:.80}, which is not in its folder.")
        if not name_exists(index.parent / name):
            raise WeightsError(f"{index} names {name}, which is missing: download or copy it again.")
        check_not_damaged(index.parent / name)
        files.append(index.parent / name)
    return tuple(files)


def read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file by name, mapped from disk.

    Raises:
        WeightsError: the file is damaged.
    """
    check_not_damaged(file)
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as exc:
        raise damaged_error(file, "safetensors") from exc


def _read_pickled(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a torch.save file by name."""
    state = load_pickle(file)
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise WeightsError(f"{file} holds something else than tensors by name.")
    tensors = {str(name): tensor for name, tensor in state.items()}
    check_stored(tensors, str(file))
    return tensors
