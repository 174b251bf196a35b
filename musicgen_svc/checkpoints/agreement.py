"""Numbers of a configuration against the tensors that it describes, before any module is built.

A module of ten million layers is never done building, even without weights. What names and shapes tell is
compared first; everything else about names and shapes is `fitting.py`'s.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch

from musicgen_svc.errors import WeightsError

_State = Mapping[str, torch.Tensor]


def agree_lm(lm: Mapping[str, Any], state: _State, origin: str) -> None:
    """Compares `transformer_lm` with a language model's tensors in audiocraft's spelling.

    Raises:
        WeightsError: they tell another number of layers or codebooks, or another width.
    """
    told = {
        "num_layers": _count(state, r"transformer\.layers\.(\d+)\."),
        "n_q": _count(state, r"emb\.(\d+)\.weight$"),
        "dim": _size(state, "emb.0.weight", 1),
        "card": _size(state, "emb.0.weight", 0, less=1),
    }
    _compare(lm, told, "language model", origin)


def agree_codec(rvq: Mapping[str, Any], state: _State, origin: str) -> None:
    """Compares `rvq` with a codec's tensors in audiocraft's spelling.

    Raises:
        WeightsError: they tell another number of codebooks, or of entries of one.
    """
    codebook = "quantizer.vq.layers.0._codebook.embed"
    told = {"n_q": _count(state, r"quantizer\.vq\.layers\.(\d+)\."), "bins": _size(state, codebook, 0)}
    _compare(rvq, told, "codec", origin)


def agree_t5(config: Mapping[str, Any], state: _State, origin: str) -> None:
    """Compares T5's configuration with the tensors of its encoder.

    Raises:
        WeightsError: they tell another number of layers, another width or vocabulary.
    """
    told = {
        "num_layers": _count(state, r"encoder\.block\.(\d+)\."),
        "vocab_size": _size(state, "shared.weight", 0),
        "d_model": _size(state, "shared.weight", 1),
    }
    _compare(config, told, "T5 encoder", origin)


def _compare(config: Mapping[str, Any], told: Mapping[str, int | None], what: str, origin: str) -> None:
    """Of what is absent on either side nothing is known."""
    for name, number in told.items():
        if number is not None and config.get(name, number) != number:
            raise WeightsError(
                f"{origin} does not fit its configuration as a {what}: {name} is {config[name]} there, "
                f"and the tensors have {number}."
            )


def _count(state: _State, pattern: str) -> int | None:
    return len({match[1] for name in state if (match := re.match(pattern, name))}) or None


def _size(state: _State, name: str, dimension: int, less: int = 0) -> int | None:
    tensor = state.get(name)
    return None if tensor is None or tensor.ndim != 2 else tensor.shape[dimension] - less
