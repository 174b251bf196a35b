"""A folder written by transformers' `save_pretrained`: MusicGen or MusicGen Melody, with its codec and T5."""

import math
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from musicgen_svc.checkpoints.base import (
    Checkpoint,
    CodecPointer,
    OpenedCheckpoint,
    TransformersPart,
    part_name,
)
from musicgen_svc.checkpoints.configs import check_lm
from musicgen_svc.checkpoints.field_types import Integer, quoted
from musicgen_svc.checkpoints.infer_config import (
    ENCODEC,
    PROVIDER,
    T5_BY_WIDTH,
    infer_config,
    with_window,
)
from musicgen_svc.checkpoints.key_names import State, parametrized_weight_norm
from musicgen_svc.checkpoints.tensor_checks import summarize_tensors
from musicgen_svc.checkpoints.tensor_files import TRANSFORMERS_FILES, read_json, read_tensors, tensor_files
from musicgen_svc.checkpoints.transformers_names import (
    AUDIO_ENCODER,
    TEXT_ENCODER,
    THIRDS,
    name_of_third,
    target_of,
)
from musicgen_svc.errors import WeightsError

MODEL_TYPES = ("musicgen", "musicgen_melody")
TEXT_ENCODER_NAME = "text_encoder"
"""The name that the configuration gives a T5 of no released width, which only this folder has."""

_POSITIONS = "decoder.model.decoder.embed_positions.weights"  # a constant that older versions saved
_TIED = ("shared.weight", "encoder.embed_tokens.weight")
_CHROMA_HOP_S = 4096 / 32_000
_MAX_NUMBER = 1_000_000


class TransformersFolder(OpenedCheckpoint):
    """A MusicGen with transformers' names."""

    def __init__(self, folder: Path) -> None:
        """Reads the configuration and maps the tensors.

        Raises:
            WeightsError: its files are missing or cannot be read.
        """
        self._config_json = read_json(folder / "config.json")
        self._melody = self._config_json.get("model_type") == "musicgen_melody"
        self.format = f"transformers folder ({self._config_json.get('model_type')})"
        self.path = folder
        self.files = tensor_files(folder, TRANSFORMERS_FILES)
        self._origin = f"The {self.format} {folder}"
        self._tensors = read_tensors(self.files)

    def config(self) -> DictConfig:
        """The language model's configuration as audiocraft would have it.

        Raises:
            WeightsError: a field or a tensor is missing, or a value cannot be that of a MusicGen.
        """
        decoder, text = self._section("decoder"), self._section("text_encoder")
        activation = decoder.get("activation_function", "gelu")
        if activation != "gelu":
            raise WeightsError(f"{self._origin} has the activation {activation!r:.40}; MusicGen's is 'gelu'.")
        config = infer_config(
            # Only shapes are needed: on meta, no tensor is read or concatenated.
            self._state({name: tensor.to("meta") for name, tensor in self._tensors.items()}),
            self._origin,
            heads=self._number(decoder, "num_attention_heads", 16),
            stereo=self._number(decoder, "audio_channels", 1) == 2,
            t5=T5_BY_WIDTH.get(self._number(text, "d_model", 512), TEXT_ENCODER_NAME),
        )
        if self._melody:
            frames = self._number(self._config_json, "chroma_length", 235)
            config.dataset.segment_duration = _duration_s(frames)
            check_lm(OmegaConf.to_container(config), self._origin)
        return config

    def lm(self) -> Checkpoint:
        """The language model with audiocraft's names.

        Raises:
            WeightsError: as `config`.
        """
        return Checkpoint(self.config(), self._state(self._tensors), self._origin)

    def codec(self) -> TransformersPart | CodecPointer:
        """The codec inside, or the released one if the folder has none."""
        state = _under(AUDIO_ENCODER, self._tensors)
        if not state:
            return CodecPointer(part_name(ENCODEC))
        return self._part("audio_encoder", parametrized_weight_norm(state))

    def text_encoder(self) -> TransformersPart | None:
        """T5 inside; None if the folder has none."""
        state = _under(TEXT_ENCODER, self._tensors)
        if not state:
            return None
        # One tensor under two names, of which safetensors keeps one.
        for kept, left_out in (_TIED, _TIED[::-1]):
            if kept in state:
                state.setdefault(left_out, state[kept])
        return self._part("text_encoder", state)

    def _part(self, name: str, state: State) -> TransformersPart:
        return TransformersPart(
            self._section(name), state, self._origin, (self.path / "config.json", *self.files)
        )

    def _section(self, name: str) -> dict[str, Any]:
        section = self._config_json.get(name)
        return section if isinstance(section, dict) else {}

    def _number(self, section: dict[str, Any], key: str, default: int) -> int:
        """An integer of a section; transformers writes no field that has its default."""
        value = section.get(key, default)
        expected = Integer(1, _MAX_NUMBER)
        if not expected.accepts(value):
            raise WeightsError(f"{self._origin} has {key} {quoted(value)}; it must be {expected}.")
        return int(value)

    def _state(self, tensors: State) -> State:
        """The language model's tensors under audiocraft's names."""
        state: State = {}
        thirds: dict[str, dict[int, torch.Tensor]] = {}
        unexpected = []
        for name, tensor in tensors.items():
            if name.startswith((TEXT_ENCODER, AUDIO_ENCODER)) or name == _POSITIONS:
                continue
            target = target_of(name)
            if target is None:
                unexpected.append(name)
            elif target.third is None:
                state[target.key] = tensor
            else:
                thirds.setdefault(target.key, {})[target.third] = tensor
        if unexpected:
            raise WeightsError(f"{self._origin} holds {summarize_tensors(unexpected)} that no MusicGen has.")
        missing = [name_of_third(key, i) for key, parts in thirds.items() for i in THIRDS if i not in parts]
        if missing:
            raise WeightsError(f"{self._origin} lacks {summarize_tensors(missing)}.")
        for key, parts in thirds.items():
            if len({part.shape for part in parts.values()}) > 1:
                shapes = ", ".join(str(list(parts[i].shape)) for i in THIRDS)
                raise WeightsError(f"{self._origin} has q, k and v of several shapes at {key}: {shapes}.")
            state[key] = torch.cat([parts[i] for i in THIRDS])
        self._project(state, "description", self._number(self._section("text_encoder"), "d_model", 512))
        if self._melody:
            self._project(state, "self_wav", self._number(self._config_json, "num_chroma", 12))
        return with_window(state)

    def _project(self, state: State, conditioner: str, width: int) -> None:
        """Adds the identity as a conditioner's projection if there is none.

        transformers has no projection where both sides have the same width; audiocraft always has one.
        """
        key = f"{PROVIDER}{conditioner}.output_proj"
        first = state.get("emb.0.weight")
        if first is not None and f"{key}.weight" not in state and first.shape[-1] == width:
            state[f"{key}.weight"] = torch.eye(width, dtype=first.dtype, device=first.device)
            state[f"{key}.bias"] = torch.zeros(width, dtype=first.dtype, device=first.device)


def _under(prefix: str, tensors: State) -> State:
    """The tensors whose names begin with the prefix, under their names without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _duration_s(chroma_frames: int) -> float:
    """The shortest audio with so many frames of chroma, in seconds; whole seconds if that adds no frame."""
    shortest_s = (chroma_frames - 1) * _CHROMA_HOP_S
    whole_s = math.ceil(shortest_s)
    return whole_s if whole_s - shortest_s < _CHROMA_HOP_S else round(shortest_s + 0.02, 3)
