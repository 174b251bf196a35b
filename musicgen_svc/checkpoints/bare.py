"""A language model's state dict by itself, as `torch.save(lm.state_dict(), "lm_final.pt")` leaves it."""

from typing import Any

from musicgen_svc.checkpoints.torch_packages import Found, is_state, without_prefix


def find(package: dict[Any, Any]) -> Found | None:
    state = package if is_state(package) else package.get("model")
    lm = without_prefix(state) if is_state(state) else None
    return Found("bare state dict", lm) if lm else None
