"""audiocraft's own training: `checkpoint.th` in the folder of a dora experiment.

`{"xp.cfg": DictConfig, "model": state, "best_state": {"model": state}, "fsdp_best_state": the same or {}}`
and the optimizer's. The best state is kept where sharded training keeps it, else in the plain place; a
training that has not validated yet has only its current one.
"""

from typing import Any

from musicgen_svc.checkpoints.torch_packages import Found, is_state


def find(package: dict[Any, Any]) -> Found | None:
    bests = [package[key] for key in ("fsdp_best_state", "best_state") if key in package]
    if "xp.cfg" not in package or not bests:
        return None
    places = [best.get("model") for best in bests if isinstance(best, dict)] + [package.get("model")]
    states = [state for state in places if is_state(state)]
    return Found("dora checkpoint", states[0], package["xp.cfg"]) if states else None
