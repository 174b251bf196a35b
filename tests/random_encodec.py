"""Small EnCodecs with random weights, as audiocraft and as transformers build them, and noise to encode."""

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from musicgen_svc.audiocraft_compat import EncodecModel, HFEncodecCompressionModel

RATE_HZ = 32_000
SEANET = {
    "channels": 1, "dimension": 8, "n_filters": 4, "n_residual_layers": 1, "ratios": [8, 5, 4, 4],
    "norm": "weight_norm", "pad_mode": "constant", "true_skip": True, "compress": 2, "lstm": 2,
}  # fmt: skip


def encodec(renormalize: bool = False, **seanet: Any) -> EncodecModel:
    """Makes a small random EnCodec whose tokens vary and whose LSTM has a memory of seconds."""
    from audiocraft.modules import SEANetDecoder, SEANetEncoder
    from audiocraft.quantization import ResidualVectorQuantizer

    options = SEANET | seanet
    with torch.random.fork_rng([]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.nn.utils.weight_norm` is deprecated", FutureWarning)
        torch.manual_seed(0)
        model = EncodecModel(
            SEANetEncoder(**options),
            SEANetDecoder(**options),
            ResidualVectorQuantizer(dimension=options["dimension"], n_q=4, bins=64, kmeans_init=False),
            frame_rate=50,
            sample_rate=RATE_HZ,
            channels=options["channels"],
            causal=options.get("causal", False),
            renormalize=renormalize,
        ).eval()
        for lstm in (m for m in model.modules() if isinstance(m, nn.LSTM)):
            remember_for_seconds(lstm)
        spread_codebooks(model)
    return model


def remember_for_seconds(lstm: nn.LSTM) -> None:
    """Raises the bias of the forget gates, so that a cell keeps 99.3 % of its value per frame."""
    size = lstm.hidden_size
    with torch.no_grad():
        for layer in range(lstm.num_layers):
            getattr(lstm, f"bias_ih_l{layer}")[size : 2 * size] = 5.0
            getattr(lstm, f"weight_ih_l{layer}").mul_(2.0)


@torch.no_grad()
def spread_codebooks(model: EncodecModel) -> None:
    """Takes the entries of the codebooks from encoded noise, so that all tokens occur."""
    residual = model.encoder(noise(10.0, model.channels)[None])
    for layer in model.quantizer.vq.layers:
        layer.codebook.copy_(residual[0, :, torch.randperm(residual.shape[-1])[:64]].T)
        residual = residual - layer.decode(layer.encode(residual))


def in_transformers(model: EncodecModel, **config: Any) -> HFEncodecCompressionModel:
    """Makes the same codec with the same weights as a model of transformers."""
    from transformers import EncodecConfig
    from transformers import EncodecModel as TransformersEncodec

    other = TransformersEncodec(
        EncodecConfig(
            **{
                "sampling_rate": RATE_HZ, "audio_channels": 1, "target_bandwidths": [1.2], "hidden_size": 8,
                "num_filters": 4, "upsampling_ratios": [8, 5, 4, 4], "codebook_size": 64,
                "use_causal_conv": False, "use_conv_shortcut": False, "pad_mode": "constant",
            } | config
        )
    ).eval()  # fmt: skip
    for ours, theirs in [(model.encoder, other.encoder), (model.decoder, other.decoder)]:
        values = list(ours.state_dict().values())
        theirs.load_state_dict(dict(zip(theirs.state_dict(), values, strict=True)))
    for vq, layer in zip(model.quantizer.vq.layers, other.quantizer.layers, strict=True):
        layer.codebook.embed.copy_(vq.codebook)
    return HFEncodecCompressionModel(other)


def noise(seconds: float, channels: int = 1, seed: int = 1) -> Tensor:
    """Makes noise that swells and fades: [C, T]."""
    generator = torch.Generator().manual_seed(seed)
    wav = torch.randn(channels, round(seconds * RATE_HZ), generator=generator)
    swell = torch.sin(torch.arange(wav.shape[1]) * (2 * math.pi / RATE_HZ / 7.0))
    return 0.3 * wav * (1.1 + swell)
