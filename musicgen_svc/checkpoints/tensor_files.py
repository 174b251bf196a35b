"""Tensors in a folder as transformers and PEFT save them: safetensors or torch.save, whole or in shards."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from musicgen_svc.checkpoints.damage import check_not_damaged, damaged, is_there
from musicgen_svc.checkpoints.soundness import check_stored
from musicgen_svc.checkpoints.unpickle import load_pickle
from musicgen_svc.errors import WeightsError

CONFIG = "config.json"
TRANSFORMERS_FILES = ("model.safetensors", "pytorch_model.bin")
"""What transformers calls a model's weights, the newer name first."""

_MAX_JSON_BYTES = 64 << 20


def read_json(path: Path) -> dict[str, Any]:
    """
    Raises:
        WeightsError: the file is absent, damaged or holds no JSON object.
    """
    check_not_damaged(path)
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise WeightsError(f"{path} takes {path.stat().st_size} bytes, which no configuration does.")
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as exc:
        raise damaged(path, "JSON", f" (line {exc.lineno}, column {exc.colno})") from exc
    except (OSError, ValueError, RecursionError) as exc:
        raise damaged(path, "JSON") from exc
    if not isinstance(value, dict):
        raise WeightsError(f"{path} holds a {type(value).__name__}; it must hold a JSON object.")
    return value


def tensor_files(folder: Path, stems: tuple[str, ...]) -> tuple[Path, ...]:
    """The files of the first of `stems` that is there: `model.safetensors`, or its shards by their index.

    Raises:
        WeightsError: there is none, or it is damaged, or the index names a file outside the folder or one
            that is missing.
    """
    for stem in stems:
        index = folder / f"{stem}.index.json"
        if is_there(index):
            return _shards(index)
        if is_there(folder / stem):
            check_not_damaged(folder / stem)
            return (folder / stem,)
    raise WeightsError(f"{folder} holds a configuration without its weights, {' or '.join(stems)}.")


def read_tensors(files: tuple[Path, ...]) -> dict[str, torch.Tensor]:
    """All tensors of the files, mapped from disk.

    Raises:
        WeightsError: one cannot be read, or holds something else than tensors.
    """
    state: dict[str, torch.Tensor] = {}
    for file in files:
        state |= read_safetensors(file) if file.suffix == ".safetensors" else _pickled(file)
    return state


def _shards(index: Path) -> tuple[Path, ...]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise WeightsError(f"{index} names no files: it has no weight_map.")
    files = []
    for name in sorted({str(name) for name in names.values()}):
        if name != Path(name).name or name in (".", ".."):
            raise WeightsError(f"{index} names {name!r:.80}, which is not in its folder.")
        if not is_there(index.parent / name):
            raise WeightsError(f"{index} names {name}, which is missing: download or copy it again.")
        check_not_damaged(index.parent / name)
        files.append(index.parent / name)
    return tuple(files)


def read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    """
    Raises:
        WeightsError: it is damaged.
    """
    check_not_damaged(file)
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as exc:
        raise damaged(file, "safetensors") from exc


def _pickled(file: Path) -> dict[str, torch.Tensor]:
    state = load_pickle(file)
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise WeightsError(f"{file} holds something else than tensors by name.")
    tensors = {str(name): tensor for name, tensor in state.items()}
    check_stored(tensors, str(file))
    return tensors
