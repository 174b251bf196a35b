"""A language model with everything that it needs to generate."""

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
"""A window after the first begins with at least one known frame and adds at least one new frame."""


@dataclass(frozen=True)
class Model:
    """A checkpoint, ready to generate."""

    name: str
    path: Path
    """The file or folder that it was loaded from."""
    format: str
    window_s: float
    """The length of audio that it was trained on, in seconds."""
    conditioner: Conditioner
    engine: Engine
    codec: Codec
    hash: Future[str]
    """What `content_hash` waits for."""

    @property
    def window(self) -> int:
        """The length of audio that it was trained on, in frames of the codec."""
        return int(self.window_s * self.codec.frame_rate)

    @property
    def content_hash(self) -> str:
        """The sha256 of the language model's file or files. It is ready some seconds after loading."""
        return self.hash.result()


def engine_bytes(config: DictConfig, device: torch.device, *, slots: int, precision: str) -> int:
    """Returns how many bytes an engine adds to those of the model; negative if it packs the model's weights.

    On a GPU the engine keeps keys and values in fp16: of both rows of each slot, and of each slot's text.
    With a precision other than `reference`, it stores the matrices of the layers and the heads in at most two
    bytes a number, instead of the model's own type. It does the same with `reference` if the checkpoint is
    stored in float16; this is not counted, because the checkpoint's type is not known yet.

    Args:
        config: the checkpoint's configuration, in audiocraft's form.
        device: where the engine runs.
        slots: how many requests are decoded at once.
        precision: as in `engine/projections.py`.
    """
    lm = config.transformer_lm
    # Of cross-attention only the query and output matrices are packed: keys and values of the text are
    # computed once a request.
    per_layer = 4 + (2 if config.fuser.get("cross") else 0) + 2 * lm.hidden_scale
    matrices = lm.num_layers * lm.dim**2 * per_layer + lm.n_q * lm.card * lm.dim
    own, packed = 2 if device.type == "cuda" else 4, 2
    saved = 0 if precision == "reference" else (own - packed) * matrices
    return (_buffer_bytes(config, slots) if device.type == "cuda" else 0) - saved


def _buffer_bytes(config: DictConfig, slots: int) -> int:
    """Returns the bytes of the keys and values that an engine keeps on a GPU."""
    lm, capacity = config.transformer_lm, Capacity(slots)
    positions = 2 * slots * capacity.positions + (slots * capacity.text if config.fuser.get("cross") else 0)
    return int(2 * 2 * lm.num_layers * lm.dim * positions)


def check_codec(origin: str, config: DictConfig, codec: Codec) -> None:
    """Checks that a codec is the one that a language model was trained for, as far as their sizes tell.

    Args:
        origin: the checkpoint's format and path, for messages.
        config: the checkpoint's configuration, in audiocraft's form.
        codec: the codec, adapted to the configuration.

    Raises:
        WeightsError: the codec is another one, or the model's window is too short to continue any audio.
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
