"""Infers a configuration from tensors: the one of the released models, with the sizes of these tensors."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from musicgen_svc.checkpoints.configs import check_lm
from musicgen_svc.checkpoints.tensor_checks import summarize_tensors
from musicgen_svc.errors import WeightsError

ENCODEC = "facebook/encodec_32khz"
PROVIDER = "condition_provider.conditioners."
WINDOW = PROVIDER + "self_wav.chroma.spec.window"

_HEAD_WIDTH = 64
_SAMPLE_RATE_HZ = 32_000
_RADIX2_EXP = 14  # the chroma's window is 2 ** 14 = 16,384 samples, and its hop 4,096
_DURATION_S = 30
T5_BY_WIDTH = {512: "t5-small", 768: "t5-base", 1024: "t5-large"}


def infer_config(
    state: Mapping[str, torch.Tensor], origin: str, *,
    heads: int | None = None, stereo: bool | None = None, t5: str | None = None,
) -> DictConfig:  # fmt: skip
    """A released model's configuration with the sizes of `state`, which has audiocraft's names.

    Args:
        heads: how many attention heads; by default, as many as are 64 wide.
        stereo: whether the codebooks are those of two channels; by default, whether there are eight.
        t5: the text encoder's name; by default that of the released T5 of the same width.

    Raises:
        WeightsError: tensors that determine the sizes are missing, or the sizes are out of their bounds.
    """
    sizes = _Sizes(state, origin)
    if heads is None:
        if sizes.dim % _HEAD_WIDTH:
            raise WeightsError(f"{origin} is {sizes.dim} wide; MusicGen's heads are 64 each.")
        heads = sizes.dim // _HEAD_WIDTH
    stereo = sizes.codebooks == 8 if stereo is None else stereo
    if t5 is None:
        if sizes.text_width not in T5_BY_WIDTH:
            raise WeightsError(
                f"{origin} takes a text encoding {sizes.text_width} wide; known are "
                f"{', '.join(f'{name} ({width})' for width, name in T5_BY_WIDTH.items())}."
            )
        t5 = T5_BY_WIDTH[sizes.text_width]
    config = _released(sizes, heads, stereo, t5)
    check_lm(config, origin)
    return OmegaConf.create(config)


def with_window(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state with the window of the chroma's spectrogram, a constant that some tools do not save."""
    if any(key.startswith(PROVIDER + "self_wav.") for key in state) and WINDOW not in state:
        return state | {WINDOW: torch.hann_window(2**_RADIX2_EXP)}
    return state


class _Sizes:
    """The sizes of a language model, from the names and shapes of its tensors."""

    def __init__(self, state: Mapping[str, torch.Tensor], origin: str) -> None:
        text, melody = PROVIDER + "description.output_proj.weight", PROVIDER + "self_wav.output_proj.weight"
        first = "transformer.layers.0."
        needed = ["emb.0.weight", first + "linear1.weight", text]
        missing = [key for key in needed if key not in state or state[key].ndim != 2]
        if missing:
            raise WeightsError(f"{origin} does not tell its sizes, as it lacks {summarize_tensors(missing)}.")
        entries, self.dim = state["emb.0.weight"].shape
        self.card = entries - 1  # the last entry is the special token
        self.codebooks = _count(state, r"emb\.(\d+)\.weight")
        self.layers = _count(state, r"transformer\.layers\.(\d+)\..*")
        self.hidden_scale = state[first + "linear1.weight"].shape[0] / max(1, self.dim)
        self.has_cross_attention = any(".cross_attention." in key for key in state)
        self.text_width = state[text].shape[1]
        self.chroma_classes = state[melody].shape[1] if melody in state else None
        self.biases = {
            "bias_ff": first + "linear1.bias" in state,
            "bias_attn": first + "self_attn.in_proj_bias" in state,
            "bias_proj": "linears.0.bias" in state,
        }
        window = state.get(WINDOW)
        self.radix2_exp = _RADIX2_EXP if window is None else max(1, window.numel()).bit_length() - 1


def _count(state: Mapping[str, torch.Tensor], pattern: str) -> int:
    """How many different numbers the names have in the pattern's group."""
    return len({match[1] for key in state if (match := re.fullmatch(pattern, key))})


def _released(sizes: _Sizes, heads: int, stereo: bool, t5: str) -> dict[str, Any]:
    """The configuration of a released model with these sizes."""
    melody = sizes.chroma_classes is not None
    prepend = (["self_wav"] if melody else []) + ([] if sizes.has_cross_attention else ["description"])
    conditioners: dict[str, Any] = {
        "description": {
            "model": "t5",
            "t5": {"name": t5, "finetune": False, "word_dropout": 0.3, "normalize_text": False},
        }
    }
    if melody:
        conditioners["self_wav"] = {
            "model": "chroma_stem",
            "chroma_stem": {
                "sample_rate": _SAMPLE_RATE_HZ,
                "n_chroma": sizes.chroma_classes,
                "radix2_exp": sizes.radix2_exp,
                "argmax": True,
                "match_len_on_eval": True,
            },
        }
    return {
        "solver": "musicgen",
        "sample_rate": _SAMPLE_RATE_HZ,
        "channels": 2 if stereo else 1,
        "compression_model_checkpoint": f"//pretrained/{ENCODEC}",
        "lm_model": "transformer_lm",
        "transformer_lm": _transformer(sizes, heads),
        "codebooks_pattern": {
            "modeling": "delay",
            "delay": {
                # The left and right codebooks of a level share a delay.
                "delays": [k // 2 if stereo else k for k in range(sizes.codebooks)],
                "flatten_first": 0,
                "empty_initial": 0,
            },
        },
        "interleave_stereo_codebooks": {"use": stereo, "per_timestep": False},
        "classifier_free_guidance": {"training_dropout": 0.3, "inference_coef": 3.0},
        "attribute_dropout": {"args": {"active_on_eval": False}, "text": {}, "wav": {"self_wav": 0.5}}
        if melody
        else {},
        "fuser": {
            "cross_attention_pos_emb": False,
            "cross_attention_pos_emb_scale": 1,
            "sum": [],
            "prepend": prepend,
            "cross": ["description"] if sizes.has_cross_attention else [],
            "input_interpolate": [],
        },
        "conditioners": conditioners,
        "dataset": {"segment_duration": _DURATION_S},
    }


def _transformer(sizes: _Sizes, heads: int) -> dict[str, Any]:
    """The section `transformer_lm` of a released model with these sizes."""
    return {
        "dim": sizes.dim,
        "num_heads": heads,
        "num_layers": sizes.layers,
        "hidden_scale": sizes.hidden_scale,
        "n_q": sizes.codebooks,
        "card": sizes.card,
        "dropout": 0.0,
        "emb_lr": None,
        "activation": "gelu",
        "norm_first": True,
        **sizes.biases,
        "past_context": None,
        "causal": True,
        "custom": False,
        "memory_efficient": True,
        "attention_as_float32": False,
        "layer_scale": None,
        "positional_embedding": "sin",
        "xpos": False,
        "checkpointing": "none",
        "weight_init": "gaussian",
        "depthwise_init": "current",
        "zero_bias_init": True,
        "norm": "layer_norm",
        "cross_attention": False,  # audiocraft takes it from the fuser
        "qk_layer_norm": False,
        "qk_layer_norm_cross": False,
        "attention_dropout": None,
        "kv_repeat": 1,
        "two_step_cfg": False,
    }
