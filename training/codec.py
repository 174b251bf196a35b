"""EnCodec for the demo model, trained on the demo model's own sounds."""

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

TUNES = 300
CROP = SAMPLE_RATE // 2
BATCH = 8
PEAK_LR = 1e-3
UNALIGNED = 0.35  # crops that begin within a frame, as a clip that somebody cut may
UNQUANTIZED = 0.15  # of the steps: the autoencoder first learns to pass sound at all
WITH_SPECTRUM = 0.5  # of the steps: a spectral loss from the start teaches silence


def build() -> CompressionModel:
    """A fresh codec."""
    return builders.get_compression_model(OmegaConf.create(CONFIG))


def train(codec: CompressionModel, steps: int, seed: int, file: Path, report: Report) -> None:
    """Trains in place, resuming from `file`; `report(step, figures)` follows it."""
    optimizer = torch.optim.AdamW(codec.parameters(), lr=PEAK_LR, betas=(0.9, 0.99), weight_decay=0.0)
    run = Resumable(file, codec, [optimizer])
    bank = sounds()
    codec.train()
    for step in range(run.first_step, steps):
        torch.manual_seed(step_seed(seed, step))
        for group in optimizer.param_groups:
            falling = 0.51 + 0.49 * math.cos(math.pi * step / steps)
            group["lr"] = PEAK_LR * min(1, step / 50 + 0.02) * falling
        wav = crops(bank, CROP)
        penalty = torch.zeros(())
        if step < UNQUANTIZED * steps:
            heard = codec.decoder(codec.encoder(wav))
        else:
            result = codec(wav)
            heard, penalty = result.x, result.penalty
        error = heard - wav
        loss = 4 * error.abs().mean() + 20 * error.pow(2).mean() + 0.25 * penalty.mean()
        loss = loss + 0.4 * (error.abs().mean(-1) / (wav.abs().mean(-1) + 0.01)).mean()
        if step > WITH_SPECTRUM * steps and step % 3 == 0:
            loss = loss + 0.5 * spectral_distance(heard, wav)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
        optimizer.step()
        run.done(step)
        report(step, {"SI-SNR dB": si_snr_db(heard.detach(), wav).mean().item()})
    codec.eval()


def sounds() -> list[Tensor]:
    """Random tunes and the songs in every timbre, each [1, T]."""
    bank = []
    for timbre in TIMBRES:
        tunes = [random_tune(f"codec {index} {timbre}", 12) for index in range(TUNES // len(TIMBRES))]
        bank += [render(tune.notes, timbre)[None] for tune in [*tunes, *SONGS]]
    return bank


def crops(bank: list[Tensor], length: int) -> Tensor:
    """A batch [B, C, length] out of a bank of [C, T], at somewhat varied levels."""
    lengths = torch.tensor([float(wav.shape[-1]) for wav in bank])  # the longer, the likelier
    batch = []
    for which in torch.multinomial(lengths, BATCH, replacement=True).tolist():
        start = int(torch.randint(bank[which].shape[-1] - length, ()))
        if torch.rand(()) > UNALIGNED:
            start -= start % HOP
        gain_db = 2 * torch.randn(()).clamp(-2, 2)
        batch.append(bank[which][:, start : start + length] * 10 ** (gain_db / 20))
    return torch.stack(batch)


def spectral_distance(heard: Tensor, wanted: Tensor) -> Tensor:
    """Mean distance of magnitudes, linear and logarithmic, over three resolutions."""
    total = torch.zeros(())
    for size in (512, 1024, 2048):
        window = torch.hann_window(size)

        def magnitude(wav: Tensor, size: int = size, window: Tensor = window) -> Tensor:
            spectrum = torch.stft(wav.flatten(0, -2), size, size // 4, window=window, return_complex=True)
            scaled: Tensor = spectrum.abs() / size**0.5
            return scaled

        a, b = magnitude(heard), magnitude(wanted)
        total = total + (a - b).abs().mean() + 0.2 * ((a + 1e-3).log() - (b + 1e-3).log()).abs().mean()
    return total / 3


def si_snr_db(heard: Tensor, wanted: Tensor) -> Tensor:
    """Scale-invariant signal-to-noise ratio over the last axis (Le Roux et al. 2019, SI-SDR)."""
    scale = (heard * wanted).sum(-1, keepdim=True) / wanted.pow(2).sum(-1, keepdim=True).clamp(min=1e-8)
    target = scale * wanted
    ratio: Tensor = target.pow(2).sum(-1) / (heard - target).pow(2).sum(-1).clamp(min=1e-10)
    return 10 * torch.log10(ratio)


@torch.inference_mode()
def encode(codec: CompressionModel, wav: Tensor) -> Tensor:
    """[T] -> tokens [4, F]."""
    codes: Tensor = codec.encode(wav[None, None])[0][0]
    return codes


def song(index: int, timbre: str, frames: int) -> Tensor:
    """Samples of one of the eight, over and over, `frames` frames or a little more."""
    return render(looped(SONGS[index].notes, frames), timbre)
