"""The memory that an engine takes, computed from a configuration before the model is loaded."""

import torch
from omegaconf import DictConfig

from musicgen_svc.engine.state import Capacity


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
