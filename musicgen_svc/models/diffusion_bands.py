"""Loads the bands of MultiBand Diffusion from audiocraft's file: a U-Net, schedule and processor each."""

from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from musicgen_svc.audiocraft_compat import DiffusionUnet, NoiseSchedule, SampleProcessor, builders
from musicgen_svc.checkpoints.part_configs import band_fields, diffusion_fields
from musicgen_svc.checkpoints.tensor_checks import check_finite, check_stored
from musicgen_svc.checkpoints.unpickle import load_pickle
from musicgen_svc.errors import WeightsError
from musicgen_svc.models.meta_init import on_meta


@dataclass(frozen=True)
class Band:
    """The model of one frequency band."""

    unet: nn.Module
    schedule: NoiseSchedule
    processor: SampleProcessor
    """Turns the result of the diffusion chain into audio."""
    sample_rate: int
    dimension: int
    """D, the dimension of the latents that the band was trained on."""
    shrinks: int = 1
    """The factor by which the U-Net shortens audio up to its middle, where the latents are added."""

    @property
    def steps(self) -> list[int]:
        """The steps of the chain that sampling visits: every 50th, from pure noise down to 0."""
        return [*range(self.schedule.num_steps)[::-50], 0]


def load_bands(path: Path, device: torch.device) -> list[Band]:
    """Loads all bands of a file of audiocraft, such as Meta's `mbd_musicgen_32khz.th`, in fp32.

    Raises:
        WeightsError: the file is missing, unsafe or not a MultiBand Diffusion checkpoint.
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
    except Exception as exc:  # another file may fail in any of these calls
        missing = f"it has no {exc}" if type(exc) is KeyError else ""
        reason = missing or shorten(str(exc) or type(exc).__name__, 300, placeholder=" …")
        raise WeightsError(f"{path} is not a MultiBand Diffusion checkpoint: {reason}") from exc


def _build_band(package: dict[str, Any], sample_rate: int, device: torch.device, path: Path) -> Band:
    """Builds one band from its part of the file."""
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
    """Builds a band's processor.

    Raises:
        WeightsError: its statistics are not finite or zero, so its results would not be finite.
    """
    processor = builders.get_processor(OmegaConf.create(fields), sample_rate=sample_rate)
    processor.load_state_dict(state)
    if fields["use"] and "name" in fields:
        scale = (processor.std / processor.target_std) ** torch.as_tensor(processor.power_std)
        check_finite([("the processor's scale", scale), ("its mean", processor.mean)], origin)
    return processor
