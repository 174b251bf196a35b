"""The tiny checkpoints' language models, and what these need beside a codec: T5 and MultiBand Diffusion."""

import math
from pathlib import Path
from typing import Any

import torch
from _tiny_codecs import CARD, HF_CARD, LATENT, SAMPLE_RATE, package, sounds

DIM = 64  # of the language models
T5_DIM = 512  # audiocraft knows t5-small by name and holds it to this


def lm_config(name: str) -> dict[str, Any]:
    """A released model's configuration, but for the sizes."""
    n_q = 8 if name == "stereo" else 4
    t5 = {"name": "t5-small", "finetune": False, "word_dropout": 0.3, "normalize_text": False}
    chroma = {
        "sample_rate": "${sample_rate}",
        "n_chroma": 12,
        "radix2_exp": 14,
        "argmax": True,
        "match_len_on_eval": False,
        "eval_wavs": None,
        "n_eval_wavs": 100,
        "cache_path": None,
    }
    melody = name == "melody"
    conditioners: dict[str, Any] = {"description": {"model": "t5", "t5": t5}}
    if melody:
        conditioners = {"self_wav": {"model": "chroma_stem", "chroma_stem": chroma}} | conditioners
    config = {
        "device": "cuda",
        "dtype": "float16",
        "solver": "musicgen",
        "sample_rate": SAMPLE_RATE,
        "channels": 2 if name == "stereo" else 1,
        "compression_model_checkpoint": "//pretrained/facebook/encodec_32khz",
        "lm_model": "transformer_lm",
        "transformer_lm": {
            "dim": DIM,
            "num_heads": 4,
            "num_layers": 2,
            "hidden_scale": 4,
            "n_q": n_q,
            "card": HF_CARD if name == "hf-codec" else CARD,
            "dropout": 0.0,
            "emb_lr": None,
            "activation": "gelu",
            "norm_first": True,
            "bias_ff": False,
            "bias_attn": False,
            "bias_proj": False,
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
            "cross_attention": False,
            "qk_layer_norm": False,
            "qk_layer_norm_cross": False,
            "attention_dropout": None,
            "kv_repeat": 1,
            "two_step_cfg": False,
        },
        "codebooks_pattern": {
            "modeling": "delay",
            "delay": {
                "delays": [k * 4 // n_q for k in range(n_q)],
                "flatten_first": 0,
                "empty_initial": 0,
            },
        },
        "classifier_free_guidance": {"training_dropout": 0.3, "inference_coef": 3.0},
        "attribute_dropout": {"args": {"active_on_eval": False}, "text": {}, "wav": {"self_wav": 0.5}}
        if melody
        else {},
        "fuser": {
            "cross_attention_pos_emb": False,
            "cross_attention_pos_emb_scale": 1,
            "sum": [],
            "prepend": ["self_wav", "description"] if melody else [],
            "cross": [] if melody else ["description"],
            "input_interpolate": [],
        },
        "conditioners": conditioners,
        "dataset": {"segment_duration": 30},
    }
    if name == "stereo":
        config["interleave_stereo_codebooks"] = {"use": True, "per_timestep": False}
    return config


def lm_checkpoint(config: dict[str, Any]) -> dict[str, Any]:
    from omegaconf import OmegaConf

    from musicgen_svc.compat import builders

    # T5 and Demucs are no part of the checkpoint: built without them, and only their projections added.
    without = OmegaConf.create(config | {"device": "cpu", "dtype": "float32", "conditioners": {}})
    state = builders.get_lm_model(without).state_dict()
    # A fresh model hardly minds its input. Louder tokens, conditions and heads make it mind.
    gains = {"emb.": 12, "linears.": 1.5, "self_attn.out_proj": 3, "cross_attention.out_proj": 3}
    for key, tensor in state.items():
        tensor *= next((gain for part, gain in gains.items() if part in key), 1)
    widths = {"description": T5_DIM, "self_wav": 12}
    for name in config["conditioners"]:
        prefix = f"condition_provider.conditioners.{name}."
        state[prefix + "output_proj.weight"] = torch.randn(DIM, widths[name]) * 2 / math.sqrt(widths[name])
        state[prefix + "output_proj.bias"] = torch.randn(DIM) * 0.1
        if name == "self_wav":
            state[prefix + "chroma.spec.window"] = torch.hann_window(2**14)
    return package({key: tensor.half() for key, tensor in state.items()}, config)


def save_t5(folder: Path) -> None:
    """A T5 with its decoder, as the released file has one, and a tokenizer that can spell."""
    from transformers import T5Config, T5ForConditionalGeneration, T5Tokenizer

    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?'\"()&%#/+-"
    words = [
        "rock",
        "jazz",
        "piano",
        "guitar",
        "drums",
        "bass",
        "song",
        "music",
        "happy",
        "sad",
        "slow",
        "the",
    ]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [(letter, -5.0) for letter in letters] + [("▁" + word, -2.0) for word in words]
    tokenizer = T5Tokenizer(vocab=pieces)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=T5_DIM,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def diffusion_checkpoint() -> dict[Any, Any]:
    """MultiBand Diffusion in audiocraft's file: for each band a configuration and two state dicts."""
    from omegaconf import OmegaConf

    from musicgen_svc.compat import builders

    bands: dict[Any, Any] = {"sample_rate": SAMPLE_RATE, "n_bands": 4}
    for band in range(4):
        config = OmegaConf.create(_diffusion_config(band))
        model = builders.get_diffusion_model(config).eval()
        model.decoders[-1].convtr.weight.mul_(0.5)
        processor = builders.get_processor(config.processor, sample_rate=SAMPLE_RATE)
        processor.project_sample(sounds())
        for name in ("counts", "sum_x", "sum_x2", "sum_target_x2"):
            getattr(processor, name).mul_(2_000)  # as if fitted on the 10,000 samples it asks for
        bands[band] = {
            "cfg": config,
            "model_state": model.state_dict(),
            "processor_state": processor.state_dict(),
        }
    return bands


def _diffusion_config(band: int) -> dict[str, Any]:
    return {
        "solver": "diffusion",
        "sample_rate": SAMPLE_RATE,
        "channels": 1,
        "n_q": 4,
        "compression_model_checkpoint": "//pretrained/facebook/encodec_32khz",
        "diffusion_unet": {
            "hidden": 4,
            "depth": 4,
            "res_blocks": 1,
            "norm_groups": 4,
            "kernel": 8,
            "stride": 4,
            "growth": 2,
            "max_channels": 10_000,
            "dropout": 0.0,
            "emb_all_layers": True,
            "bilstm": True,
            "codec_dim": LATENT,
            "transformer": False,
            "cross_attention": False,
        },
        "processor": {
            "name": "multi_band_processor",
            "use": True,
            "n_bands": 8,
            "num_samples": 10_000,
            "power_std": 1.0,
        },
        "filter": {"use": True, "n_bands": 4, "idx_band": band, "cutoffs": None},
        "schedule": {
            "repartition": "power",
            "variable_step_batch": True,
            "beta_t0": 1.0e-5,
            "beta_t1": 2.9e-2,
            "beta_exp": 7.5,
            "num_steps": 1000,
            "variance": "beta",
            "clip": 5.0,
            "rescale": 1.0,
            "n_bands": None,
            "noise_scale": 1.0,
        },
        "metrics": {"num_stage": 4},
    }
