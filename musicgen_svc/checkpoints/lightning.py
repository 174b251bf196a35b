"""PyTorch Lightning's `last.ckpt`: `state_dict` with a prefix, usually `model.`, and no configuration."""

from typing import Any

from musicgen_svc.checkpoints.torch_packages import Found, is_state, without_prefix


def find(package: dict[Any, Any]) -> Found | None:
    state = package.get("state_dict")
    lm = without_prefix(state) if is_state(state) else None
    return Found("Lightning checkpoint", lm) if lm else None
