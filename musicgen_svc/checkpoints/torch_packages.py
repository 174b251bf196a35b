"""What the torch.save files of different tools have in common, once each tool's wrapping is off."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch

from musicgen_svc.checkpoints.agreement import agree_codec, agree_lm
from musicgen_svc.checkpoints.base import Checkpoint
from musicgen_svc.checkpoints.configs import codec_config, lm_config
from musicgen_svc.checkpoints.infer_config import infer_config, with_window
from musicgen_svc.checkpoints.key_names import State, plain_attention, plain_weight_norm
from musicgen_svc.checkpoints.soundness import check_stored

_FIRST = "emb.0.weight"


@dataclass(frozen=True)
class Found:
    """A model in the file of a known tool, as the tool wrote it."""

    format: str
    state: State
    config: Any = None
    """`xp.cfg`, where the tool keeps one."""

    @property
    def is_lm(self) -> bool:
        return _FIRST in self.state

    @property
    def is_codec(self) -> bool:
        return any(key.startswith("quantizer.") for key in self.state)


def is_state(value: object) -> TypeGuard[State]:
    """Whether it is a state dict: tensors by name, and at least one."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in value.items())
    )


def without_prefix(state: State) -> State | None:
    """The language model that lies at some depth in a state dict; of several, the one called `model`."""
    prefixes = [key.removesuffix(_FIRST) for key in state if key == _FIRST or key.endswith(f".{_FIRST}")]
    if len(prefixes) > 1 and "model." in prefixes:
        prefixes = ["model."]
    if len(prefixes) != 1:
        return None
    prefix = prefixes[0]
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


def as_lm(found: Found, file: Path) -> Checkpoint:
    """
    Raises:
        WeightsError: its configuration is no MusicGen's, its tensors tell other sizes or none, or they are
            not all in the file.
    """
    origin = f"The {found.format} {file}"
    check_stored(found.state, origin)
    state = with_window(plain_attention(found.state))
    if found.config is None:
        return Checkpoint(infer_config(state, origin), state, origin, (file,))
    config = lm_config(found.config, origin)
    agree_lm(config.transformer_lm, state, origin)
    return Checkpoint(config, state, origin, (file,))


def as_codec(found: Found, file: Path) -> Checkpoint:
    """
    Raises:
        WeightsError: it has no configuration of EnCodec's, or its tensors tell other sizes or are not all
            in the file.
    """
    origin = f"The {found.format} {file}"
    check_stored(found.state, origin)
    config, state = codec_config(found.config, origin), plain_weight_norm(found.state)
    agree_codec(config.rvq, state, origin)
    return Checkpoint(config, state, origin, (file,))
