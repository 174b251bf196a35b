"""Maps the names of a MusicGen's tensors in transformers to those in audiocraft.

It is the inverse of transformers' own conversion.
"""

import re
from dataclasses import dataclass

TEXT_ENCODER = "text_encoder."
AUDIO_ENCODER = "audio_encoder."

_CONDITIONERS = "condition_provider.conditioners."
_MODULES = {
    r"(?:decoder\.)?model\.decoder\.embed_tokens\.(\d+)": r"emb.\1",
    r"(?:decoder\.)?model\.decoder\.layer_norm": "out_norm",
    r"(?:decoder\.)?lm_heads\.(\d+)": r"linears.\1",
    r"enc_to_dec_proj": _CONDITIONERS + "description.output_proj",
    r"audio_enc_to_dec_proj": _CONDITIONERS + "self_wav.output_proj",
}
_LAYER = re.compile(r"(?:decoder\.)?model\.decoder\.layers\.(\d+)\.(.+)")
_IN_LAYER = {
    "self_attn.out_proj": "self_attn.out_proj",
    "self_attn_layer_norm": "norm1",
    "encoder_attn.out_proj": "cross_attention.out_proj",
    "encoder_attn_layer_norm": "norm_cross",
    "fc1": "linear1",
    "fc2": "linear2",
    "final_layer_norm": "norm2",
}
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
THIRDS = (0, 1, 2)
"""The thirds of an `in_proj_weight`: query, key and value."""
_ATTENTIONS = {"self_attn": "self_attn", "encoder_attn": "cross_attention"}


@dataclass(frozen=True)
class Target:
    """The tensor, or the third of its rows, that a tensor of transformers is in audiocraft's state dict."""

    key: str
    third: int | None = None
    """0, 1 or 2: the rows of the query, the key or the value. None: all rows."""


def target_of(name: str) -> Target | None:
    """The target of `module.weight` or `module.bias`; None if the language model has no such parameter."""
    module, _, parameter = name.rpartition(".")
    if parameter not in ("weight", "bias"):
        return None
    for pattern, replacement in _MODULES.items():
        if match := re.fullmatch(pattern, module):
            return Target(f"{match.expand(replacement)}.{parameter}")
    if not (match := _LAYER.fullmatch(module)):
        return None
    prefix, inner = f"transformer.layers.{match[1]}.", match[2]
    if inner in _IN_LAYER:
        return Target(f"{prefix}{_IN_LAYER[inner]}.{parameter}")
    attention, _, projection = inner.rpartition(".")
    if attention in _ATTENTIONS and projection in _PROJECTIONS:
        return Target(f"{prefix}{_ATTENTIONS[attention]}.in_proj_{parameter}", _PROJECTIONS.index(projection))
    return None


def name_of_third(key: str, third: int) -> str:
    """The name in transformers of one third of `in_proj_weight`, for messages."""
    attention = key.rpartition(".")[0].replace("transformer.", "decoder.model.decoder.")
    attention = attention.replace("cross_attention", "encoder_attn")
    return f"{attention}.{_PROJECTIONS[third]}.{key.rpartition('_')[2]}"
