"""The Cog trainer's `trained_model.tar`: no tar, but torch.save of `xp.cfg`, a DictConfig, and `model`."""

from typing import Any

from musicgen_svc.checkpoints.torch_packages import Found, is_state


def find(package: dict[Any, Any]) -> Found | None:
    state = package.get("model")
    if "xp.cfg" in package and is_state(state):
        return Found("Cog trainer's file", state, package["xp.cfg"])
    return None
