"""Measures the time that a request spends outside the engine, on random modules of the released sizes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.workload import timed
from musicgen_svc.audiocraft_compat import NoiseSchedule, builders
from musicgen_svc.checkpoints import TransformersPart
from musicgen_svc.models.diffusion_bands import Band
from musicgen_svc.models.encodec import Codec
from musicgen_svc.models.encodec_builder import build_codec
from musicgen_svc.models.multiband_diffusion import MultiBandDiffusion
from musicgen_svc.runtime.randomness import GlobalRandom


@dataclass(frozen=True)
class Sizes:
    """Sizes of the modules beside the language model, by the names of their configurations."""

    t5: Mapping[str, Any]
    encodec: Mapping[str, Any]
    unet: Mapping[str, Any]


RELEASED = Sizes(
    t5={"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
    encodec={"num_filters": 64, "hidden_size": 128, "codebook_dim": 128, "codebook_size": 2048},
    unet={"hidden": 48, "growth": 4, "codec_dim": 128, "bilstm": True},
)
"""T5 base, EnCodec at 32 kHz, and MultiBand Diffusion's U-Net for MusicGen, as audiocraft publishes it
(config/model/score/basic.yaml). Two of its values are assumptions: the codec's width, and an LSTM in the
middle, which makes the model three times as large and may be in Meta's file."""
TINY = Sizes(
    t5={"d_model": 8, "d_kv": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1},
    encodec={"num_filters": 4, "hidden_size": 16, "codebook_dim": 16, "codebook_size": 2048},
    unet={"hidden": 4, "growth": 2, "codec_dim": 16, "bilstm": True},
)
"""Sizes with which a command can be tried on any machine."""

SAMPLE_RATE_HZ, FRAME_RATE_HZ, CODEBOOKS, BANDS = 32_000, 50, 4, 4


@torch.inference_mode()
def beside(
    seconds: float, device: torch.device, sizes: Sizes = RELEASED, *, mbd: bool = False
) -> dict[str, float]:
    """Runs T5, EnCodec and MultiBand Diffusion once each, after a short warm-up.

    Args:
        seconds: of audio to decode.
        device: where the modules are.
        sizes: of the modules.
        mbd: whether MultiBand Diffusion is measured.

    Returns:
        dict: seconds by name.
    """
    from transformers import T5Config, T5EncoderModel

    with torch.device(device):
        t5 = T5EncoderModel(T5Config(**sizes.t5)).eval()
    words = torch.ones(1, 12, dtype=torch.long, device=device)
    codec = random_codec(sizes, device)
    codes = torch.zeros(CODEBOOKS, round(seconds * FRAME_RATE_HZ), dtype=torch.long, device=device)
    few = codes[:, :FRAME_RATE_HZ]
    t5(words)
    codec.decode(few)
    result = {
        "t5_s": timed(lambda: t5(words), device)[1],
        "encodec_decode_s": timed(lambda: codec.decode(codes), device)[1],
    }
    if mbd:
        del t5
        diffusion = MultiBandDiffusion([random_band(sizes, device)] * BANDS, codec)
        with GlobalRandom(0, device).pinned():
            diffusion.decode(few[:, :8])
            result["mbd_decode_s"] = timed(lambda: diffusion.decode(codes), device)[1]
    return result


def random_codec(sizes: Sizes, device: torch.device) -> Codec:
    """Builds MusicGen's EnCodec as the service does: 32 kHz in 4 codebooks at 50 Hz."""
    from transformers import EncodecConfig, EncodecModel

    config = EncodecConfig(
        sampling_rate=SAMPLE_RATE_HZ, audio_channels=1, normalize=False, upsampling_ratios=[8, 5, 4, 4],
        use_causal_conv=False, use_conv_shortcut=False,
        target_bandwidths=[CODEBOOKS * FRAME_RATE_HZ * bits_of(sizes.encodec["codebook_size"]) / 1000],
        **sizes.encodec,
    )  # fmt: skip
    drawn = TransformersPart(config.to_dict(), EncodecModel(config).state_dict(), "a random codec")
    return Codec(build_codec(drawn, device))


def bits_of(cardinality: int) -> int:
    """Bits that number this many tokens."""
    return (cardinality - 1).bit_length()


def random_band(sizes: Sizes, device: torch.device) -> Band:
    """Builds one of the four bands, which have the same sizes.

    One can be used four times without an effect on speed: each evaluation reads all its weights, which are
    larger than any processor's cache.
    """
    config = band_config(sizes)
    with torch.device(device):
        unet = builders.get_diffusion_model(config)
    processor = builders.get_processor(config.processor, sample_rate=SAMPLE_RATE_HZ)
    processor.project_sample(torch.randn(1, 1, SAMPLE_RATE_HZ))
    return Band(
        unet=unet.eval().requires_grad_(False),
        schedule=NoiseSchedule(**config.schedule, device="cpu"),  # as in the service, see diffusion_bands.py
        processor=processor.to(device).eval(),
        sample_rate=SAMPLE_RATE_HZ,
        dimension=unet.conv_codec.in_channels,
    )


def band_config(sizes: Sizes) -> Any:
    """A band's configuration, as in audiocraft's checkpoint."""
    from omegaconf import OmegaConf

    return OmegaConf.create(
        {
            "channels": 1,
            "schedule": {
                "repartition": "power", "beta_t0": 1e-5, "beta_t1": 2.9e-2, "beta_exp": 7.5,
                "num_steps": 1000, "variance": "beta", "clip": 5.0, "rescale": 1.0, "noise_scale": 1.0,
            },
            "diffusion_unet": {
                "depth": 4, "res_blocks": 1, "norm_groups": 4, "kernel": 8, "stride": 4,
                "max_channels": 10_000, "emb_all_layers": True, **sizes.unet,
            },
            "processor": {"name": "multi_band_processor", "use": True, "n_bands": 8, "num_samples": 10_000},
        }
    )  # fmt: skip
