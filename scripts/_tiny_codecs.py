"""The tiny checkpoints' codecs, in audiocraft's spelling and in transformers', and what all of them share."""

import contextlib
import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

CARD = 400  # codebook size: above top-k's default of 250
HF_CARD = 512  # audiocraft's wrapper of transformers' EnCodec takes powers of two only
LATENT = 16  # of either codec
SAMPLE_RATE = 32_000
RATIOS = [8, 5, 4, 4]  # hop 640: 50 frames a second


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
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


def package(state: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, Any]:
    """What audiocraft's export writes."""
    from omegaconf import OmegaConf

    return {
        "best_state": state,
        "xp.cfg": OmegaConf.to_yaml(OmegaConf.create(config)),
        "version": "1.3.0",
        "exported": True,
    }


def codec_config() -> dict[str, Any]:
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


def codec_checkpoint() -> dict[str, Any]:
    from omegaconf import OmegaConf

    from musicgen_svc.compat import builders

    config = codec_config()
    model = builders.get_compression_model(OmegaConf.create(config | {"device": "cpu"})).eval()
    _tune(model.encoder, model.decoder, [layer._codebook for layer in model.quantizer.vq.layers])
    return package(model.state_dict(), config)


def hf_codec() -> nn.Module:
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

    latents = encoder(sounds()).transpose(1, 2).flatten(0, 1)  # [B·T, D]
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


def sounds(seconds: int = 2) -> torch.Tensor:
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
