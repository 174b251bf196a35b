"""The spellings of one tensor's name that tools and their versions disagree on."""

from typing import TypeAlias

import torch

State: TypeAlias = dict[str, torch.Tensor]

_WEIGHT_NORM = {
    "parametrizations.weight.original0": "weight_g",
    "parametrizations.weight.original1": "weight_v",
}


def plain_weight_norm(state: State) -> State:
    """Weight norm as `weight_g` and `weight_v`, which audiocraft's modules have."""
    return _respelled(state, _WEIGHT_NORM)


def parametrized_weight_norm(state: State) -> State:
    """Weight norm as parametrizations, which transformers' modules have."""
    return _respelled(state, {new: old for old, new in _WEIGHT_NORM.items()})


def plain_attention(state: State) -> State:
    """Attention's tensors without the wrapper that models not marked as memory efficient have."""
    return {plain_attention_name(key): tensor for key, tensor in state.items()}


def plain_attention_name(key: str) -> str:
    return key.replace("_attn.mha.", "_attn.").replace("_attention.mha.", "_attention.")


def _respelled(state: State, endings: dict[str, str]) -> State:
    result = {}
    for key, tensor in state.items():
        for old, new in endings.items():
            if key.endswith(f".{old}"):
                key = key.removesuffix(old) + new
                break
        result[key] = tensor
    return result
