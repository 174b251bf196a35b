"""The models of MultiBand Diffusion in audiocraft's file: for each band a U-Net, schedule and processor."""

from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from musicgen_svc.audiocraft_compat import DiffusionUnet, NoiseSchedule, SampleProcessor, builders
from musicgen_svc.checkpoints.part_configs import band_fields, diffusion_fields
from musicgen_svc.checkpoints.soundness import check_finite, check_stored
from musicgen_svc.checkpoints.unpickle import load_pickle
from musicgen_svc.errors import WeightsError
from musicgen_svc.models.meta_init import on_meta


@dataclass(frozen=True)
class Band:
    """One band's model."""

    unet: nn.Module
    schedule: NoiseSchedule
    processor: SampleProcessor
    """The way back from what the chain ends in to audio."""
    sample_rate: int
    dimension: int
    """Of the latents that it was trained on."""
    shrinks: int = 1
    """How many samples become one in the middle of the U-Net, where the latents are added."""

    @property
    def steps(self) -> list[int]:
        """The states of the chain that sampling visits: every 50th, from pure noise down."""
        return [*range(self.schedule.num_steps)[::-50], 0]


def load_bands(path: Path, device: torch.device) -> list[Band]:
    """Builds the models in audiocraft's file, such as Meta's `mbd_musicgen_32khz.th`.

    Raises:
        WeightsError: the file is absent, unsafe or of another kind.
    """
    return build_bands(load_pickle(path), path, device)


def build_bands(package: Any, path: Path, device: torch.device) -> list[Band]:
    """Builds the models in the content of audiocraft's file.

    Args:
        package: what the file holds.
        path: the file, for messages.
        device: where the models will run.

    Raises:
        WeightsError: the file is of another kind.
    """
    try:
        top = diffusion_fields(package, str(path))
        return [
            _build_band(package[index], top["sample_rate"], device, path) for index in range(top["n_bands"])
        ]
    except WeightsError:
        raise
    except Exception as exc:  # a file of another kind fails wherever it is first looked at
        missing = f"it has no {exc}" if type(exc) is KeyError else ""
        reason = missing or shorten(str(exc) or type(exc).__name__, 300, placeholder=" …")
        raise WeightsError(f"{path} is not a MultiBand Diffusion checkpoint: {reason}") from exc


def _build_band(package: dict[str, Any], sample_rate: int, device: torch.device, path: Path) -> Band:
    config = band_fields(package["cfg"], str(path))
    with on_meta():
        unet = DiffusionUnet(chin=config.channels, num_steps=config.schedule["num_steps"], **config.unet)
    check_stored(package["model_state"], str(path))
    unet.load_state_dict(package["model_state"], assign=True)
    unet = unet.to(device, torch.float32).eval().requires_grad_(False)
    check_finite(unet.state_dict().items(), str(path))
    processor = _processor(config.processor, package["processor_state"], sample_rate, str(path))
    return Band(
        unet=unet,
        schedule=NoiseSchedule(**config.schedule, device="cpu"),
        processor=processor.to(device).eval(),
        sample_rate=sample_rate,
        dimension=config.unet["codec_dim"],
        shrinks=config.unet.get("stride", 2) ** config.unet.get("depth", 3),
    )


def _processor(
    fields: dict[str, Any], state: dict[str, torch.Tensor], sample_rate: int, origin: str
) -> SampleProcessor:
    """
    Raises:
        WeightsError: it was fitted on nothing, so that it makes no finite numbers.
    """
    processor = builders.get_processor(OmegaConf.create(fields), sample_rate=sample_rate)
    processor.load_state_dict(state)
    if fields["use"] and "name" in fields:
        scale = (processor.std / processor.target_std) ** torch.as_tensor(processor.power_std)
        check_finite([("the processor's scale", scale), ("its mean", processor.mean)], origin)
    return processor
