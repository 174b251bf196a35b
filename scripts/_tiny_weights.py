"""Tiny random checkpoints in the official on-disk formats, laid out as the service's `weights/`.

They say nothing musical: they are for tests, where every key, shape, flag and file has to be the one
that the released files have, and where a condition, a seed or a code that changes must be heard.
Same source, same bytes: every part is made under its own seed, on one thread.

    python scripts/_tiny_weights.py DIR

    small/ stereo/          text models: 4 codebooks, and 8 interleaved ones
    melody/                 chroma and text as a prefix, no cross-attention
    hf-codec/               a text model whose codec file only points to facebook/encodec_32khz
    t5-small/ htdemucs/ encodec_32khz/ multiband-diffusion/      what the models need beside them
"""

import contextlib
import hashlib
import math
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

CARD = 400  # codebook size: above top-k's default of 250
HF_CARD = 512  # audiocraft's wrapper of transformers' EnCodec takes powers of two only
LATENT = 16  # of either codec
DIM = 64  # of the language models
T5_DIM = 512  # audiocraft knows t5-small by name and holds it to this
SAMPLE_RATE = 32_000
RATIOS = [8, 5, 4, 4]  # hop 640: 50 frames a second
REVISION = "0" * 40  # of every repository in the pretended hub cache
HUB = {
    "t5-small": "t5-small",
    "htdemucs": "adefossez/HTDemucs",
    "encodec_32khz": "facebook/encodec_32khz",
}


def home(root: Path) -> Path:
    """Where `ensure(root)` puts the folder: named after the content of what makes it."""
    makers = (Path(__file__), root / "training" / "separator.py")
    made_by = hashlib.sha256(b"".join(maker.read_bytes() for maker in makers))
    return root / ".cache" / f"tiny-weights-{made_by.hexdigest()[:12]}"


def ensure(root: Path) -> Path:
    """The folder, built on the first call; several processes may ask at once."""
    final = home(root)
    if not final.is_dir():
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=final.name + ".", dir=final.parent))
        try:
            build(temporary)
            with contextlib.suppress(OSError):  # another process was first: its bytes are these bytes
                temporary.rename(final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        assert final.is_dir(), f"{final} could not be made"
    return final


def build(folder: Path) -> None:
    """Writes everything into `folder`."""
    from transformers.utils import logging

    from training.separator import save_separator

    logging.disable_progress_bar()
    for name in ("small", "melody", "stereo", "hf-codec", "multiband-diffusion"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    with _seeded(1):
        _save_t5(folder / "t5-small")
        save_separator(folder / "htdemucs")
    with _seeded(2):
        codec = _codec_checkpoint()
    with _seeded(3):
        _hf_codec().save_pretrained(folder / "encodec_32khz")
    with _seeded(4):
        torch.save(_diffusion_checkpoint(), folder / "multiband-diffusion" / "mbd_musicgen_32khz.th")
    for seed, name in enumerate(("small", "melody", "stereo", "hf-codec"), 5):
        with _seeded(seed):
            torch.save(_lm_checkpoint(_lm_config(name)), folder / name / "state_dict.bin")
        pointer = {"pretrained": "facebook/encodec_32khz", "exported": True, "version": "1.3.0"}
        package = pointer if name == "hf-codec" else codec
        torch.save(package, folder / name / "compression_state_dict.bin")


def hub_cache(weights: Path, cache: Path) -> None:
    """Lays `weights` out in `cache` as a Hugging Face cache, for audiocraft, which loads by name."""
    for folder, repository in HUB.items():
        if not (weights / folder).is_dir():
            continue
        home = cache / f"models--{repository.replace('/', '--')}"
        (home / "refs").mkdir(parents=True, exist_ok=True)
        (home / "refs" / "main").write_text(REVISION)
        snapshot = home / "snapshots" / REVISION
        snapshot.mkdir(parents=True, exist_ok=True)
        for file in (weights / folder).iterdir():
            link = snapshot / file.name
            if not link.exists():
                link.unlink(missing_ok=True)
                with contextlib.suppress(FileExistsError):  # another process made it meanwhile
                    link.symlink_to(file.resolve())


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings():
        # audiocraft builds its convolutions with the older of torch's two weight norms.
        warnings.filterwarnings("ignore", "`torch.nn.utils.weight_norm` is deprecated", FutureWarning)
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def _package(state: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, Any]:
    """What audiocraft's export writes."""
    from omegaconf import OmegaConf

    return {
        "best_state": state,
        "xp.cfg": OmegaConf.to_yaml(OmegaConf.create(config)),
        "version": "1.3.0",
        "exported": True,
    }


# --- language models -----------------------------------------------------------------------------


def _lm_config(name: str) -> dict[str, Any]:
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


def _lm_checkpoint(config: dict[str, Any]) -> dict[str, Any]:
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
    return _package({key: tensor.half() for key, tensor in state.items()}, config)


# --- codecs --------------------------------------------------------------------------------------


def _codec_config() -> dict[str, Any]:
    return {
        "device": "cuda",
        "dtype": "float32",
        "sample_rate": SAMPLE_RATE,
        "channels": 1,
        "compression_model": "encodec",
        "encodec": {
            "autoencoder": "seanet",
            "quantizer": "rvq",
            "sample_rate": "${sample_rate}",
            "channels": "${channels}",
            "causal": False,
            "renormalize": False,
        },
        "seanet": {
            "dimension": LATENT,
            "channels": "${channels}",
            "causal": "${encodec.causal}",
            "n_filters": 4,
            "n_residual_layers": 1,
            "ratios": RATIOS,
            "activation": "ELU",
            "activation_params": {"alpha": 1.0},
            "norm": "weight_norm",
            "norm_params": {},
            "kernel_size": 7,
            "residual_kernel_size": 3,
            "last_kernel_size": 7,
            "dilation_base": 2,
            "pad_mode": "constant",
            "true_skip": True,
            "compress": 2,
            "lstm": 2,
            "disable_norm_outer_blocks": 0,
            "decoder": {"trim_right_ratio": 1.0, "final_activation": None, "final_activation_params": None},
            "encoder": {},
        },
        "rvq": {
            "n_q": 4,
            "q_dropout": False,
            "bins": CARD,
            "decay": 0.99,
            "kmeans_init": True,
            "kmeans_iters": 50,
            "threshold_ema_dead_code": 2,
            "orthogonal_reg_weight": 0.0,
            "orthogonal_reg_active_codes_only": False,
        },
    }


def _codec_checkpoint() -> dict[str, Any]:
    from omegaconf import OmegaConf

    from musicgen_svc.compat import builders

    config = _codec_config()
    model = builders.get_compression_model(OmegaConf.create(config | {"device": "cpu"})).eval()
    _tune(model.encoder, model.decoder, [layer._codebook for layer in model.quantizer.vq.layers])
    return _package(model.state_dict(), config)


def _hf_codec() -> nn.Module:
    """transformers' EnCodec with the flags of `facebook/encodec_32khz`."""
    from transformers import EncodecConfig, EncodecModel

    config = EncodecConfig(
        target_bandwidths=[4 * 50 * math.log2(HF_CARD) / 1000],  # kbit/s: 4 codebooks
        sampling_rate=SAMPLE_RATE,
        audio_channels=1,
        normalize=False,
        chunk_length_s=None,
        overlap=None,
        hidden_size=LATENT,
        num_filters=4,
        num_residual_layers=1,
        upsampling_ratios=RATIOS,
        norm_type="weight_norm",
        use_causal_conv=False,
        pad_mode="reflect",
        num_lstm_layers=2,
        codebook_size=HF_CARD,
        codebook_dim=LATENT,
        use_conv_shortcut=False,
    )
    model = EncodecModel(config).eval()
    _tune(model.encoder, model.decoder, [layer.codebook for layer in model.quantizer.layers])
    return model


def _tune(encoder: nn.Module, decoder: nn.Module, codebooks: list[Any]) -> None:
    """Makes a fresh codec one that hears, remembers and speaks at a sane level."""
    for module in [*encoder.modules(), *decoder.modules()]:
        if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
            _gain(module).mul_(2)  # a fresh convolution halves the level
        if isinstance(module, nn.LSTM):
            for name, parameter in module.named_parameters():
                if name.startswith("bias_ih"):
                    parameter.chunk(4)[1].fill_(5)  # forget gate 0.993: half is left after 2 s
                if name.startswith("weight_ih"):
                    parameter.mul_(2)

    latents = encoder(_sounds()).transpose(1, 2).flatten(0, 1)  # [B·T, D]
    quantized = torch.zeros_like(latents)
    for codebook in codebooks:
        residual = latents - quantized
        chosen = residual[torch.randint(len(residual), (codebook.codebook_size,))]
        codebook.embed.copy_(chosen + 0.3 * residual.std() * torch.randn_like(chosen))
        codebook.embed_avg.copy_(codebook.embed)
        codebook.cluster_size.fill_(1)
        codebook.inited.fill_(1)
        quantized += codebook.decode(codebook.encode(residual))

    last = [module for module in decoder.modules() if isinstance(module, nn.Conv1d)][-1]
    last.bias.zero_()
    wav = decoder(quantized[None].transpose(1, 2))
    loudness = 0.1 / wav.std()
    _gain(last).mul_(loudness)
    last.bias.sub_(wav.mean() * loudness)


def _gain(convolution: nn.Module) -> torch.Tensor:
    """The weight norm's gain, in either of torch's spellings."""
    parameters = dict(convolution.named_parameters())
    return parameters.get("weight_g", parameters.get("parametrizations.weight.original0"))


def _sounds(seconds: int = 2) -> torch.Tensor:
    """Chords with harmonics and a decay, under noise: [B, 1, T] at 32 kHz."""
    time_s = torch.arange(seconds * SAMPLE_RATE) / SAMPLE_RATE
    wavs = []
    for _ in range(8):
        wav = 0.02 * torch.randn_like(time_s)
        for _ in range(6):
            pitch_hz, start_s = 80 * 2 ** (4 * torch.rand(1)), seconds * torch.rand(1)
            envelope = (time_s > start_s) * torch.exp(-3 * (time_s - start_s).clamp(min=0))
            for harmonic in (1, 2, 3):
                wav += 0.3 / harmonic * envelope * torch.sin(2 * math.pi * harmonic * pitch_hz * time_s)
        wavs.append(wav)
    return torch.stack(wavs)[:, None]


# --- what the models need beside them ------------------------------------------------------------


def _save_t5(folder: Path) -> None:
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


def _diffusion_checkpoint() -> dict[Any, Any]:
    """MultiBand Diffusion in audiocraft's file: for each band a configuration and two state dicts."""
    from omegaconf import OmegaConf

    from musicgen_svc.compat import builders

    package: dict[Any, Any] = {"sample_rate": SAMPLE_RATE, "n_bands": 4}
    for band in range(4):
        config = OmegaConf.create(_diffusion_config(band))
        model = builders.get_diffusion_model(config).eval()
        model.decoders[-1].convtr.weight.mul_(0.5)
        processor = builders.get_processor(config.processor, sample_rate=SAMPLE_RATE)
        processor.project_sample(_sounds())
        for name in ("counts", "sum_x", "sum_x2", "sum_target_x2"):
            getattr(processor, name).mul_(2_000)  # as if fitted on the 10,000 samples it asks for
        package[band] = {
            "cfg": config,
            "model_state": model.state_dict(),
            "processor_state": processor.state_dict(),
        }
    return package


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


if __name__ == "__main__":
    sys.path.insert(0, os.fspath(Path(__file__).resolve().parent.parent))
    build(Path(sys.argv[1]))
