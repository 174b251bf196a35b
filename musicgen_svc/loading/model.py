"""A language model with all that it takes to generate."""

from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig

from musicgen_svc.engine.engine import Engine
from musicgen_svc.engine.state import Capacity
from musicgen_svc.errors import WeightsError
from musicgen_svc.models.conditioners import MELODY, Conditioner
from musicgen_svc.models.encodec import Codec

_MIN_WINDOW_FRAMES = 2
"""A window that follows another begins with a known frame and adds one."""


@dataclass(frozen=True)
class Model:
    """A checkpoint, ready to generate."""

    name: str
    place: Path
    """The file or folder that it was loaded from."""
    format: str
    window_s: float
    """The longest stretch that it was trained on."""
    conditioner: Conditioner
    engine: Engine
    codec: Codec
    hash: Future[str]

    @property
    def window(self) -> int:
        """`window_s` in frames."""
        return int(self.window_s * self.codec.frame_rate)

    @property
    def content_hash(self) -> str:
        """sha256 of the language model's file or files; right after loading it may take seconds."""
        return self.hash.result()


def engine_bytes(config: DictConfig, device: torch.device, *, slots: int, precision: str) -> int:
    """How much more an engine takes than the model that it decodes with; below 0 where it packs that.

    On a GPU it keeps keys and values of every slot's two rows and of its text, in fp16. A precision other
    than `reference` has matrices of the layers and the heads in two bytes a number at most, in place of
    the model's own. So has `reference`, where a checkpoint is stored in float16, which is not known yet.
    """
    lm = config.transformer_lm
    # Of attention to a text only query and output: its keys and values are computed once a request.
    per_layer = 4 + (2 if config.fuser.get("cross") else 0) + 2 * lm.hidden_scale
    matrices = lm.num_layers * lm.dim**2 * per_layer + lm.n_q * lm.card * lm.dim
    own, packed = 2 if device.type == "cuda" else 4, 2
    saved = 0 if precision == "reference" else (own - packed) * matrices
    return (_buffer_bytes(config, slots) if device.type == "cuda" else 0) - saved


def _buffer_bytes(config: DictConfig, slots: int) -> int:
    lm, capacity = config.transformer_lm, Capacity(slots)
    positions = 2 * slots * capacity.positions + (slots * capacity.text if config.fuser.get("cross") else 0)
    return int(2 * 2 * lm.num_layers * lm.dim * positions)


def check_codec(origin: str, config: DictConfig, codec: Codec) -> None:
    """A language model speaks the tokens of one codec only, and must see at least two of its frames.

    Raises:
        WeightsError: this is another one, or the model's window is too short to continue anything.
    """
    wanted = (config.transformer_lm.n_q, config.transformer_lm.card)
    if wanted != (codec.codebooks, codec.cardinality):
        raise WeightsError(
            f"{origin} was trained for {wanted[0]} codebooks of {wanted[1]} "
            f"entries, and its codec has {codec.codebooks} of {codec.cardinality}."
        )
    if MELODY in config.conditioners and config.sample_rate != codec.sample_rate:
        raise WeightsError(
            f"{origin} follows melodies at {config.sample_rate} Hz, and its codec is at "
            f"{codec.sample_rate} Hz."
        )
    frames = int(config.dataset.segment_duration * codec.frame_rate)
    if frames < _MIN_WINDOW_FRAMES:
        raise WeightsError(
            f"{origin} has dataset.segment_duration {config.dataset.segment_duration} s, which is {frames} "
            f"frames of its codec; it must be {_MIN_WINDOW_FRAMES} at least."
        )
