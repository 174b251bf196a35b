"""The demo model's EnCodec, trained on the renderings of its own songs and of random tunes."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from musicgen_svc.audiocraft_compat import CompressionModel, builders
from training.resuming import Resumable, step_seed
from training.synth import HOP, SAMPLE_RATE, TIMBRES, looped, render
from training.tunes import SONGS, random_tune

Report = Callable[[int, dict[str, float]], None]
"""Called after each training step as `report(step, figures)`."""

CONFIG: dict[str, Any] = {
    "device": "cpu",
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
        "dimension": 64,
        "channels": "${channels}",
        "causal": "${encodec.causal}",
        "n_filters": 12,
        "n_residual_layers": 1,
        "ratios": [8, 5, 4, 4],
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
        "lstm": 0,
        "disable_norm_outer_blocks": 0,
        "decoder": {"trim_right_ratio": 1.0, "final_activation": None, "final_activation_params": None},
        "encoder": {},
    },
    "rvq": {
        "n_q": 4,
        "q_dropout": False,
        "bins": 256,
        "decay": 0.99,
        "kmeans_init": True,
        "kmeans_iters": 50,
        "threshold_ema_dead_code": 2,
        "orthogonal_reg_weight": 0.0,
        "orthogonal_reg_active_codes_only": False,
    },
}

TUNES = 300  # random tunes
CROP = SAMPLE_RATE // 2  # samples
BATCH = 8
PEAK_LR = 1e-3
UNALIGNED = 0.35  # the part of the crops that begin within a codec frame, as any clip of a user may
UNQUANTIZED = 0.15  # the part of the steps before the quantizer is used: the autoencoder alone learns faster
SPECTRAL_LOSS_FROM = 0.5  # the part of the steps before the spectral loss is used: earlier it teaches silence


def build() -> CompressionModel:
    """Builds a codec with random weights."""
    return builders.get_compression_model(OmegaConf.create(CONFIG))


def train(codec: CompressionModel, steps: int, seed: int, file: Path, report: Report) -> None:
    """Trains a codec in place.

    Args:
        codec: what is trained.
        steps: how many.
        seed: of all draws.
        file: where the run is saved, and from where it is resumed if the file exists.
        report: called after each step.
    """
    optimizer = torch.optim.AdamW(codec.parameters(), lr=PEAK_LR, betas=(0.9, 0.99), weight_decay=0.0)
    run = Resumable(file, codec, [optimizer])
    bank = training_audio()
    codec.train()
    for step in range(run.first_step, steps):
        torch.manual_seed(step_seed(seed, step))
        for group in optimizer.param_groups:
            falling = 0.51 + 0.49 * math.cos(math.pi * step / steps)
            group["lr"] = PEAK_LR * min(1, step / 50 + 0.02) * falling
        wav = random_crops(bank, CROP)
        penalty = torch.zeros(())
        if step < UNQUANTIZED * steps:
            output = codec.decoder(codec.encoder(wav))
        else:
            result = codec(wav)
            output, penalty = result.x, result.penalty
        error = output - wav
        loss = 4 * error.abs().mean() + 20 * error.pow(2).mean() + 0.25 * penalty.mean()
        loss = loss + 0.4 * (error.abs().mean(-1) / (wav.abs().mean(-1) + 0.01)).mean()
        if step > SPECTRAL_LOSS_FROM * steps and step % 3 == 0:
            loss = loss + 0.5 * spectral_distance(output, wav)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
        optimizer.step()
        run.done(step)
        report(step, {"SI-SNR dB": si_snr_db(output.detach(), wav).mean().item()})
    codec.eval()


def training_audio() -> list[Tensor]:
    """Renders random tunes and the songs in every timbre: each [1, T]."""
    bank = []
    for timbre in TIMBRES:
        tunes = [random_tune(f"codec {index} {timbre}", 12) for index in range(TUNES // len(TIMBRES))]
        bank += [render(tune.notes, timbre)[None] for tune in [*tunes, *SONGS]]
    return bank


def random_crops(bank: list[Tensor], length: int) -> Tensor:
    """Draws a batch of crops, [B, C, length], from signals [C, T], and varies their levels by up to 4 dB."""
    lengths = torch.tensor([float(wav.shape[-1]) for wav in bank])  # the probability of a signal
    batch = []
    for which in torch.multinomial(lengths, BATCH, replacement=True).tolist():
        start = int(torch.randint(bank[which].shape[-1] - length, ()))
        if torch.rand(()) > UNALIGNED:
            start -= start % HOP
        gain_db = 2 * torch.randn(()).clamp(-2, 2)
        batch.append(bank[which][:, start : start + length] * 10 ** (gain_db / 20))
    return torch.stack(batch)


def spectral_distance(output: Tensor, wanted: Tensor) -> Tensor:
    """Returns the mean distance of two signals' magnitudes, linear and logarithmic, at three resolutions."""
    total = torch.zeros(())
    for size in (512, 1024, 2048):
        window = torch.hann_window(size)

        def magnitude(wav: Tensor, size: int = size, window: Tensor = window) -> Tensor:
            spectrum = torch.stft(wav.flatten(0, -2), size, size // 4, window=window, return_complex=True)
            scaled: Tensor = spectrum.abs() / size**0.5
            return scaled

        a, b = magnitude(output), magnitude(wanted)
        total = total + (a - b).abs().mean() + 0.2 * ((a + 1e-3).log() - (b + 1e-3).log()).abs().mean()
    return total / 3


def si_snr_db(output: Tensor, wanted: Tensor) -> Tensor:
    """Returns the scale-invariant signal-to-noise ratio over the last axis.

    It is the SI-SDR of Le Roux et al., "SDR - half-baked or well done?" (2019, arXiv:1811.02508).
    """
    scale = (output * wanted).sum(-1, keepdim=True) / wanted.pow(2).sum(-1, keepdim=True).clamp(min=1e-8)
    target = scale * wanted
    ratio: Tensor = target.pow(2).sum(-1) / (output - target).pow(2).sum(-1).clamp(min=1e-10)
    return 10 * torch.log10(ratio)


@torch.inference_mode()
def encode(codec: CompressionModel, wav: Tensor) -> Tensor:
    """Encodes samples with audiocraft's own method: [T] -> tokens [4, F]."""
    codes: Tensor = codec.encode(wav[None, None])[0][0]
    return codes


def song_samples(index: int, timbre: str, frames: int) -> Tensor:
    """Renders one of the eight songs, repeated until it has at least `frames` frames: [T]."""
    return render(looped(SONGS[index].notes, frames), timbre)
