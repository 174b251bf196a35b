"""Whether a state dict is the one that a module needs."""

from collections.abc import Mapping

import torch

from musicgen_svc.checkpoints.base import some
from musicgen_svc.errors import WeightsError


def check_fit(
    own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], what: str, origin: str
) -> None:
    """Compares names and shapes of a module's `own` state with those of a checkpoint.

    Args:
        what: the module, as the message calls it: `language model`.
        origin: the checkpoint's format and path.

    Raises:
        WeightsError: names are missing or unexpected, shapes differ, or there are complex numbers or integers
            where numbers in floating point belong; the message names the first few.
    """
    faults = []
    if missing := own.keys() - state.keys():
        faults.append(f"it lacks {some(sorted(missing))}")
    if unexpected := state.keys() - own.keys():
        faults.append(f"it has {some(sorted(unexpected))} too many")
    shapes = [
        f"{name} is {list(state[name].shape)} where {list(own[name].shape)} belongs"
        for name in sorted(own.keys() & state.keys())
        if own[name].shape != state[name].shape
    ]
    if shapes:
        faults.append(f"it has {some(shapes)} of another shape")
    types = [
        f"{name} is {str(state[name].dtype).removeprefix('torch.')}"
        for name in sorted(own.keys() & state.keys())
        if own[name].is_floating_point() and not state[name].is_floating_point()
    ]
    if types:
        faults.append(f"it has {some(types)} that are not in floating point")
    if faults:
        raise WeightsError(
            f"{origin} does not fit its configuration as a {what}: {'; '.join(faults)}; weights and "
            "configuration must be of one model."
        )
