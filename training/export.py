"""Writes the trained models to files in MusicGen's official format, so that they load like any checkpoint."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from musicgen_svc.audiocraft_compat import CompressionModel
from training import codec as encodec
from training import lm as language
from training.data import chroma_extractor


def save_language_model(model: language.DemoModel, file: Path) -> None:
    """Writes `state_dict.bin`, in half precision like the released files."""
    state = dict(model.lm.state_dict())
    for name, projection in (("description", model.text), ("self_wav", model.chroma)):
        for key, tensor in projection.state_dict().items():
            state[f"condition_provider.conditioners.{name}.output_proj.{key}"] = tensor
    state["condition_provider.conditioners.self_wav.chroma.spec.window"] = chroma_extractor().spec.window
    _save(state, language.CONFIG, file)


def save_codec(codec: CompressionModel, file: Path) -> None:
    """Writes `compression_state_dict.bin`, in half precision."""
    _save(dict(codec.state_dict()), encodec.CONFIG, file)


def _save(state: dict[str, Tensor], config: dict[str, Any], file: Path) -> None:
    """Writes a state dict and its configuration as audiocraft's export does."""
    package = {
        "best_state": {key: t.half() if t.is_floating_point() else t for key, t in state.items()},
        "xp.cfg": OmegaConf.to_yaml(OmegaConf.create(config)),
        "version": "1.3.0",
        "exported": True,
    }
    torch.save(package, file)
