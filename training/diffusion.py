"""MultiBand Diffusion for the demo model's codec: a small U-Net for each of four bands."""

import math
from pathlib import Path
from typing import Any

import julius
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from musicgen_svc.audiocraft_compat import CompressionModel, NoiseSchedule, SampleProcessor, builders
from training.codec import CONFIG as CODEC
from training.codec import Report, random_crops
from training.resuming import Resumable, step_seed
from training.synth import SAMPLE_RATE

STEPS = (8000, 8000, 6000, 2400)
"""How many steps each band is trained; the highest band is nearly silent."""

BANDS = len(STEPS)
PEAK_LR = 7e-3
CROP = SAMPLE_RATE // 4  # samples
FITTED_ON = 400  # examples from which the processor computes the level of a band


def config(band: int) -> dict[str, Any]:
    """Returns the configuration of a band: that of the released models, with these differences.

    - The sizes are smaller, and only the first layer gets the diffusion step.
    - The processor normalizes the band as a whole and not in eight bands. Most of these would be nearly
      silent here; they would be amplified to the level of the tune, and the model would mostly learn them.
    """
    return {
        "solver": "diffusion",
        "sample_rate": SAMPLE_RATE,
        "channels": 1,
        "n_q": CODEC["rvq"]["n_q"],
        "compression_model_checkpoint": "//pretrained/facebook/encodec_32khz",
        "diffusion_unet": {
            "hidden": 8,
            "depth": 4,
            "res_blocks": 1,
            "norm_groups": 4,
            "kernel": 8,
            "stride": 4,
            "growth": 2,
            "max_channels": 48,
            "dropout": 0.0,
            "emb_all_layers": False,
            "bilstm": True,
            "codec_dim": CODEC["seanet"]["dimension"],
            "transformer": False,
            "cross_attention": False,
        },
        "processor": {
            "name": "multi_band_processor",
            "use": True,
            "n_bands": 1,
            "num_samples": FITTED_ON,
            "power_std": 1.0,
        },
        "filter": {"use": True, "n_bands": BANDS, "idx_band": band, "cutoffs": None},
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


class BandModel(nn.Module):
    """The U-Net of one band, and the processor that normalizes the band."""

    def __init__(self, band: int) -> None:
        """Makes a model with random weights for the band with this number, from 0."""
        super().__init__()
        self.config = OmegaConf.create(config(band))
        self.unet: nn.Module = builders.get_diffusion_model(self.config)
        self.processor: SampleProcessor = builders.get_processor(
            self.config.processor, sample_rate=SAMPLE_RATE
        )
        self.band = band

    def package(self) -> dict[str, Any]:
        """Returns the band's part of audiocraft's file, with weights in half precision."""
        state = {name: t.half() if t.is_floating_point() else t for name, t in self.unet.state_dict().items()}
        return {"cfg": self.config, "model_state": state, "processor_state": self.processor.state_dict()}


def train(
    model: BandModel,
    codec: CompressionModel,
    bank: list[Tensor],
    steps: int,
    seed: int,
    file: Path,
    report: Report,
) -> None:
    """Trains a band in place to predict the noise in a noisy band from the codec's latents.

    Args:
        model: what is trained.
        codec: gives the latents.
        bank: signals, each [1, T].
        steps: how many.
        seed: of all draws.
        file: where the run is saved, and from where it is resumed if the file exists.
        report: called after each step.
    """
    optimizer = torch.optim.AdamW(model.unet.parameters(), lr=PEAK_LR, weight_decay=0.0)
    run = Resumable(file, model, [optimizer])
    schedule = NoiseSchedule(
        **model.config.schedule, device=torch.device("cpu"), sample_processor=model.processor
    )
    split = julius.SplitBands(SAMPLE_RATE, n_bands=BANDS)
    # The bands are split before crops are taken, because a filter turns the edges of a crop into clicks.
    both = [torch.cat([wav, split(wav)[model.band]]) for wav in bank]
    model.train()
    for step in range(run.first_step, steps):
        torch.manual_seed(step_seed(seed, step))
        for group in optimizer.param_groups:
            group["lr"] = (
                PEAK_LR * min(1, step / 20 + 0.05) * (0.51 + 0.49 * math.cos(math.pi * step / steps))
            )
        wav, band = torch.split(random_crops(both, CROP), 1, dim=1)  # [B, 1, T] each
        with torch.no_grad():
            latents = codec.decode_latent(codec.encode(wav)[0])
        noisy, noise, at = schedule.get_training_item(band, tensor_step=True)
        error = (model.unet(noisy, at, condition=latents).sample - noise).pow(2).mean((1, 2))
        # As in audiocraft, the error is relative to that of the noisy signal itself.
        loss = (error / (noisy - noise).pow(2).mean((1, 2)).clamp(min=1e-4)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.unet.parameters(), 1.0)
        optimizer.step()
        run.done(step)
        report(step, {"mean square of the noise left": error.mean().item()})
    model.eval()


def save(models: list[BandModel], file: Path) -> None:
    """Writes all bands to one file in the format of audiocraft's `mbd_musicgen_32khz.th`."""
    package: dict[Any, Any] = {"sample_rate": SAMPLE_RATE, "n_bands": len(models)}
    package |= {model.band: model.package() for model in models}
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(package, file)
