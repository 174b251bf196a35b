"""audiocraft's export: a folder with `state_dict.bin` and `compression_state_dict.bin`.

Each file is `{"best_state": state dict, "xp.cfg": YAML string, ...}`; the second may instead be a
pointer, `{"pretrained": "facebook/encodec_32khz"}`.
"""

from pathlib import Path
from typing import Any

from musicgen_svc.catalog import CODEC_FILE, LM_FILE
from musicgen_svc.checkpoints.opened import Checkpoint, CodecPointer, component_name
from musicgen_svc.checkpoints.packages import Found, as_codec, as_lm, is_state
from musicgen_svc.checkpoints.unpickle import load_pickle
from musicgen_svc.errors import WeightsError

__all__ = ["Checkpoint", "CodecPointer", "find", "find_pointer", "read_codec", "read_lm"]


def find(package: dict[Any, Any]) -> Found | None:
    state = package.get("best_state")
    if "xp.cfg" in package and is_state(state):
        return Found("audiocraft export", state, package["xp.cfg"])
    return None


def find_pointer(package: dict[Any, Any]) -> CodecPointer | None:
    return CodecPointer(component_name(package["pretrained"])) if "pretrained" in package else None


def read_lm(folder: Path) -> Checkpoint:
    """The language model of an export.

    Raises:
        WeightsError: the file is absent, unreadable or not an export.
    """
    path = folder / LM_FILE
    return as_lm(_found(load_pickle(path), path), f"The audiocraft export {path}")


def read_codec(folder: Path) -> Checkpoint | CodecPointer:
    """The codec of an export.

    Raises:
        WeightsError: the file is absent, unreadable or not an export.
    """
    path = folder / CODEC_FILE
    package = load_pickle(path)
    pointer = find_pointer(package) if isinstance(package, dict) else None
    return pointer or as_codec(_found(package, path), f"The audiocraft export {path}")


def _found(package: Any, path: Path) -> Found:
    found = find(package) if isinstance(package, dict) else None
    if found is None:
        raise WeightsError(f"{path} is not an audiocraft export: it has no best_state or no xp.cfg.")
    return found
