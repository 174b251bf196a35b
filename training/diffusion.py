"""MultiBand Diffusion for the demo model's codec: four small U-Nets, one for each band."""

import math
from pathlib import Path
from typing import Any

import julius
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from musicgen_svc.audiocraft_compat import CompressionModel, NoiseSchedule, SampleProcessor, builders
from training.codec import CONFIG as CODEC
from training.codec import Report, crops
from training.resuming import Resumable, step_seed
from training.synth import SAMPLE_RATE

STEPS = (8000, 8000, 6000, 2400)
"""Of each band; the highest holds next to nothing."""

BANDS = len(STEPS)
PEAK_LR = 7e-3
CROP = SAMPLE_RATE // 4
FITTED_ON = 400  # examples that set the level of the diffusion's space


def config(band: int) -> dict[str, Any]:
    """As audiocraft's released ones, but for the sizes, and that only the first layer sees the step.

    And that a band's space has one level, not one for each of eight bands in it: but for one or two those
    hold nothing, which would be made as loud as the tune, and heard as all that there is to learn.
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
    """One band's U-Net and the levels of its space."""

    def __init__(self, band: int) -> None:
        super().__init__()
        self.config = OmegaConf.create(config(band))
        self.unet: nn.Module = builders.get_diffusion_model(self.config)
        self.processor: SampleProcessor = builders.get_processor(
            self.config.processor, sample_rate=SAMPLE_RATE
        )
        self.band = band

    def package(self) -> dict[str, Any]:
        """What audiocraft's file holds of a band, in half precision."""
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
    """Trains in place, resuming from `file`: the noise in a noisy band, given the codec's latents."""
    optimizer = torch.optim.AdamW(model.unet.parameters(), lr=PEAK_LR, weight_decay=0.0)
    run = Resumable(file, model, [optimizer])
    schedule = NoiseSchedule(
        **model.config.schedule, device=torch.device("cpu"), sample_processor=model.processor
    )
    split = julius.SplitBands(SAMPLE_RATE, n_bands=BANDS)
    # Before anything is cut out: where a piece begins and ends a filter would hear a click.
    both = [torch.cat([wav, split(wav)[model.band]]) for wav in bank]
    model.train()
    for step in range(run.first_step, steps):
        torch.manual_seed(step_seed(seed, step))
        for group in optimizer.param_groups:
            group["lr"] = (
                PEAK_LR * min(1, step / 20 + 0.05) * (0.51 + 0.49 * math.cos(math.pi * step / steps))
            )
        wav, band = torch.split(crops(both, CROP), 1, dim=1)  # [B, 1, T] each
        with torch.no_grad():
            latents = codec.decode_latent(codec.encode(wav)[0])
        noisy, noise, at = schedule.get_training_item(band, tensor_step=True)
        error = (model.unet(noisy, at, condition=latents).sample - noise).pow(2).mean((1, 2))
        # As audiocraft weighs it: relative to what the noisy signal itself would have scored.
        loss = (error / (noisy - noise).pow(2).mean((1, 2)).clamp(min=1e-4)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.unet.parameters(), 1.0)
        optimizer.step()
        run.done(step)
        report(step, {"mean square of the noise left": error.mean().item()})
    model.eval()


def save(models: list[BandModel], file: Path) -> None:
    """`mbd_musicgen_32khz.th`, as audiocraft lays it out."""
    package: dict[Any, Any] = {"sample_rate": SAMPLE_RATE, "n_bands": len(models)}
    package |= {model.band: model.package() for model in models}
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(package, file)
