"""audiocraft's export: a folder with `state_dict.bin` and `compression_state_dict.bin`.

Each file is `{"best_state": state dict, "xp.cfg": YAML string, ...}`; the second may instead be a
pointer, `{"pretrained": "facebook/encodec_32khz"}`.
"""

from typing import Any

from musicgen_svc.checkpoints.base import CodecPointer, component_name
from musicgen_svc.checkpoints.torch_packages import Found, is_state


def find(package: dict[Any, Any]) -> Found | None:
    state = package.get("best_state")
    if "xp.cfg" in package and is_state(state):
        return Found("audiocraft export", state, package["xp.cfg"])
    return None


def find_pointer(package: dict[Any, Any]) -> CodecPointer | None:
    return CodecPointer(component_name(package["pretrained"])) if "pretrained" in package else None
