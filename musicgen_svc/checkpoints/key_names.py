"""Names of one tensor that differ between tools, or between versions of a tool."""

import torch

type State = dict[str, torch.Tensor]

_WEIGHT_NORM = {
    "parametrizations.weight.original0": "weight_g",
    "parametrizations.weight.original1": "weight_v",
}


def plain_weight_norm(state: State) -> State:
    """The state with weight norm as `weight_g` and `weight_v`, which audiocraft's modules have."""
    return _with_endings(state, _WEIGHT_NORM)


def parametrized_weight_norm(state: State) -> State:
    """The state with weight norm as parametrizations, which transformers' modules have."""
    return _with_endings(state, {plain: parametrized for parametrized, plain in _WEIGHT_NORM.items()})


def plain_attention(state: State) -> State:
    """The state with attention's tensors under the names of a memory-efficient model.

    Other models keep them one module deeper, in `mha`.
    """
    return {plain_attention_name(key): tensor for key, tensor in state.items()}


def plain_attention_name(key: str) -> str:
    """One name without the `mha` module that only models without memory-efficient attention have."""
    return key.replace("_attn.mha.", "_attn.").replace("_attention.mha.", "_attention.")


def _with_endings(state: State, endings: dict[str, str]) -> State:
    """The state with the last parts of its names replaced: old -> new."""
    result = {}
    for key, tensor in state.items():
        for old, new in endings.items():
            if key.endswith(f".{old}"):
                key = key.removesuffix(old) + new
                break
        result[key] = tensor
    return result
