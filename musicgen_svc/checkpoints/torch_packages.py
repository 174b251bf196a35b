"""Finds the one model in a package, which is the dictionary that a tool saved with torch.save.

The formats, told apart by their keys:

    audiocraft export      {"best_state": state, "xp.cfg": YAML string}, one file for each of two models.
                           The codec's file may be a pointer instead: {"pretrained": "facebook/encodec_32khz"}
    dora checkpoint        {"xp.cfg": DictConfig, "model": state, "best_state": {"model": state},
                           "fsdp_best_state": the same or {}}: `checkpoint.th` of audiocraft's own training
    Cog trainer's file     {"xp.cfg": DictConfig, "model": state}: `trained_model.tar`, which is not a tar
    Lightning checkpoint   {"state_dict": state with a prefix, usually "model."}: `last.ckpt`
    bare state dict        state, or {"model": state}: `torch.save(lm.state_dict(), "lm_final.pt")`
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch

from musicgen_svc.checkpoints.base import Checkpoint, CodecPointer, part_name
from musicgen_svc.checkpoints.configs import codec_config, lm_config
from musicgen_svc.checkpoints.infer_config import infer_config, with_window
from musicgen_svc.checkpoints.key_names import State, plain_attention, plain_weight_norm
from musicgen_svc.checkpoints.tensor_checks import check_codec_sizes, check_lm_sizes, check_stored

_FIRST_EMBEDDING = "emb.0.weight"
Package = dict[Any, Any]


@dataclass(frozen=True)
class PackagedModel:
    """A language model or a codec in the package of a known tool, with the names that the tool gave."""

    format: str
    state: State
    config: Any = None
    """`xp.cfg`, where the tool keeps one."""

    @property
    def is_lm(self) -> bool:
        """Whether it is a language model."""
        return _FIRST_EMBEDDING in self.state

    @property
    def is_codec(self) -> bool:
        """Whether it is a codec."""
        return any(key.startswith("quantizer.") for key in self.state)


def find_model(package: object) -> PackagedModel | CodecPointer | None:
    """The model in a package, or the codec that it points to; None if it is of no known tool.

    Args:
        package: what a torch.save file holds, or the tensors of a safetensors file by name.
    """
    if not isinstance(package, dict):
        return None
    for find in _FORMATS:
        if found := find(package):
            return found
    return CodecPointer(part_name(package["pretrained"])) if "pretrained" in package else None


def _find_export(package: Package) -> PackagedModel | None:
    """The model of an audiocraft export."""
    state = package.get("best_state")
    if "xp.cfg" in package and _is_state(state):
        return PackagedModel("audiocraft export", state, package["xp.cfg"])
    return None


def _find_dora(package: Package) -> PackagedModel | None:
    """The best model of an audiocraft training.

    Sharded training keeps the best state under `fsdp_best_state`, other training under `best_state`. A
    training that has not validated yet has only its current state, `model`.
    """
    best = [package[key] for key in ("fsdp_best_state", "best_state") if key in package]
    if "xp.cfg" not in package or not best:
        return None
    candidates = [entry.get("model") for entry in best if isinstance(entry, dict)] + [package.get("model")]
    states = [state for state in candidates if _is_state(state)]
    return PackagedModel("dora checkpoint", states[0], package["xp.cfg"]) if states else None


def _find_cog_trainer(package: Package) -> PackagedModel | None:
    """The model of the Cog trainer."""
    state = package.get("model")
    if "xp.cfg" in package and _is_state(state):
        return PackagedModel("Cog trainer's file", state, package["xp.cfg"])
    return None


def _find_lightning(package: Package) -> PackagedModel | None:
    """The language model of a PyTorch Lightning checkpoint."""
    state = package.get("state_dict")
    lm = _without_prefix(state) if _is_state(state) else None
    return PackagedModel("Lightning checkpoint", lm) if lm else None


def _find_bare(package: Package) -> PackagedModel | None:
    """The language model of a state dict that was saved alone."""
    state = package if _is_state(package) else package.get("model")
    lm = _without_prefix(state) if _is_state(state) else None
    return PackagedModel("bare state dict", lm) if lm else None


_FORMATS: tuple[Callable[[Package], PackagedModel | None], ...] = (
    _find_export, _find_dora, _find_cog_trainer, _find_lightning, _find_bare,
)  # fmt: skip
"""In this order: the keys of an earlier format may include those of a later one."""


def _is_state(value: object) -> TypeGuard[State]:
    """Whether it is a state dict: tensors by name, and at least one."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in value.items())
    )


def _without_prefix(state: State) -> State | None:
    """The language model whose names in a state dict share a prefix; of several, the one under `model.`."""
    prefixes = [
        key.removesuffix(_FIRST_EMBEDDING)
        for key in state
        if key == _FIRST_EMBEDDING or key.endswith(f".{_FIRST_EMBEDDING}")
    ]
    if len(prefixes) > 1 and "model." in prefixes:
        prefixes = ["model."]
    if len(prefixes) != 1:
        return None
    prefix = prefixes[0]
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


def as_lm(model: PackagedModel, file: Path) -> Checkpoint:
    """The language model with audiocraft's names and a complete configuration.

    Raises:
        WeightsError: its configuration is not that of a MusicGen, its tensors have other sizes or do not
            determine any, or they are not complete in the file.
    """
    origin = f"The {model.format} {file}"
    check_stored(model.state, origin)
    state = with_window(plain_attention(model.state))
    if model.config is None:
        return Checkpoint(infer_config(state, origin), state, origin, (file,))
    config = lm_config(model.config, origin)
    check_lm_sizes(config.transformer_lm, state, origin)
    return Checkpoint(config, state, origin, (file,))


def as_codec(model: PackagedModel, file: Path) -> Checkpoint:
    """The codec with audiocraft's names and its configuration.

    Raises:
        WeightsError: it has no configuration of an EnCodec, its tensors have other sizes, or they are not
            complete in the file.
    """
    origin = f"The {model.format} {file}"
    check_stored(model.state, origin)
    config, state = codec_config(model.config, origin), plain_weight_norm(model.state)
    check_codec_sizes(config.rvq, state, origin)
    return Checkpoint(config, state, origin, (file,))
