"""A language model with all that it takes to generate."""

from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig

from musicgen_svc.codec import Codec
from musicgen_svc.conditioning import Conditioner
from musicgen_svc.engine.engine import Engine
from musicgen_svc.engine.state import Capacity
from musicgen_svc.errors import WeightsError


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
    """What an engine keeps beside the model that it decodes with.

    On a GPU keys and values of every slot's two rows and of its text, in fp16; and what a faster
    precision packs: the matrices of the layers and the heads, in two bytes a number at most. What the
    model lets go of for it is not taken off, as both are there for a moment.
    """
    lm = config.transformer_lm
    # Of attention to a text only query and output: its keys and values are computed once a request.
    per_layer = 4 + (2 if config.fuser.get("cross") else 0) + 2 * lm.hidden_scale
    matrices = lm.num_layers * lm.dim**2 * per_layer + lm.n_q * lm.card * lm.dim
    packed = 0 if precision == "reference" else 2 * matrices
    return packed + (_buffer_bytes(config, slots) if device.type == "cuda" else 0)


def _buffer_bytes(config: DictConfig, slots: int) -> int:
    lm, capacity = config.transformer_lm, Capacity(slots)
    positions = 2 * slots * capacity.positions + (slots * capacity.text if config.fuser.get("cross") else 0)
    return int(2 * 2 * lm.num_layers * lm.dim * positions)


def check_codec(origin: str, config: DictConfig, codec: Codec) -> None:
    """A language model speaks the tokens of one codec only.

    Raises:
        WeightsError: this is another one.
    """
    wanted = (config.transformer_lm.n_q, config.transformer_lm.card)
    if wanted != (codec.codebooks, codec.cardinality):
        raise WeightsError(
            f"{origin} was trained for {wanted[0]} codebooks of {wanted[1]} "
            f"entries, and its codec has {codec.codebooks} of {codec.cardinality}."
        )
