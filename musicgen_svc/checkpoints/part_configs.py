"""Configurations of what stands beside a language model: T5, EnCodec, Demucs, MultiBand Diffusion."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import musicgen_svc.checkpoints.known_part_fields as known
from musicgen_svc.checkpoints.configs import check_stack
from musicgen_svc.checkpoints.expansion import expanded
from musicgen_svc.checkpoints.fields import checked, shown
from musicgen_svc.errors import WeightsError

_MAX_CODEBOOKS = 64


def t5_fields(config: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """What `T5Encoder` takes, from transformers' `T5Config`.

    Raises:
        WeightsError: a field is of another kind or out of its range, or the positions have no buckets.
    """
    fields = checked(config, known.T5, "", origin, others=True)
    count, farthest = fields["relative_attention_num_buckets"], fields["relative_attention_max_distance"]
    if count % 2 or farthest <= count // 4:
        raise WeightsError(
            f"{origin} has relative_attention_num_buckets {count} and relative_attention_max_distance "
            f"{farthest}; the first must be even, and the second more than a quarter of it."
        )
    return fields


def encodec_fields(config: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """What builds transformers' `EncodecModel`, from its configuration.

    Raises:
        WeightsError: a field is of another kind or out of its range, or they do not go together.
    """
    own = checked(config, known.TRANSFORMERS_ENCODEC, "", origin, others=True)
    check_stack(
        origin,
        rate_hz=own["sampling_rate"],
        ratios=own["upsampling_ratios"],
        filters=own["num_filters"],
        compress=own["compress"],
        dilation=own["dilation_growth_rate"] ** max(0, own["num_residual_layers"] - 1),
    )
    if own.get("codebook_dim") not in (None, own["hidden_size"]):
        raise WeightsError(
            f"{origin} has codebook_dim {own['codebook_dim']} and hidden_size {own['hidden_size']}; "
            "they must be equal."
        )
    bits = math.log2(own["codebook_size"])
    if not bits.is_integer():
        raise WeightsError(f"{origin} has codebook_size {own['codebook_size']}; it must be a power of 2.")
    rate = own["sampling_rate"] / math.prod(own["upsampling_ratios"])
    for bandwidth in own["target_bandwidths"]:
        codebooks = bandwidth * 1000 / (rate * bits)
        if not 1 <= codebooks < _MAX_CODEBOOKS + 1:
            raise WeightsError(
                f"{origin} has target_bandwidths with {bandwidth:g} kbit/s, which is {codebooks:.6g} "
                f"codebooks; 1 to {_MAX_CODEBOOKS} are accepted."
            )
    greatest, rounded_up = max(own["target_bandwidths"]), math.ceil(rate)
    if int(greatest * 1000 / (rate * bits)) != 1000 * own["target_bandwidths"][-1] // (rounded_up * bits):
        raise WeightsError(
            f"{origin} has target_bandwidths {shown(own['target_bandwidths'])}; the last must be the "
            f"greatest, and as many codebooks at {rounded_up} frames a second."
        )
    return own


@dataclass(frozen=True)
class BandFields:
    """What builds one band's model of MultiBand Diffusion."""

    channels: int
    unet: dict[str, Any]
    schedule: dict[str, Any]
    processor: dict[str, Any]


def diffusion_fields(package: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """`sample_rate` and `n_bands` of audiocraft's file.

    Raises:
        WeightsError: they are of another kind or out of their range.
        KeyError, TypeError: it is another kind of file.
    """
    own = {name: package[name] for name in known.DIFFUSION}
    return checked(own, known.DIFFUSION, "", origin)


def band_fields(config: object, origin: str) -> BandFields:
    """The configuration of one band, from a YAML string or OmegaConf's object.

    Raises:
        WeightsError: a field is of another kind or out of its range, or they do not go together.
    """
    plain = expanded(config, origin)
    unet = checked(plain.get("diffusion_unet"), known.DIFFUSION_UNET, "diffusion_unet", origin)
    schedule = checked(plain.get("schedule"), known.DIFFUSION_SCHEDULE, "schedule", origin, others=True)
    processor = checked(plain.get("processor"), known.DIFFUSION_PROCESSOR, "processor", origin)
    top = checked(plain, known.BAND, "", origin, others=True)
    powers = processor.get("power_std")
    if isinstance(powers, list) and len(powers) != processor.get("n_bands", 8):
        raise WeightsError(
            f"{origin} has {len(powers)} numbers in processor.power_std; each band must have one."
        )
    kernel, stride = unet.get("kernel", 4), unet.get("stride", 2)
    if kernel < stride or (kernel - stride) % 2:
        raise WeightsError(
            f"{origin} has diffusion_unet.kernel {kernel} and stride {stride}; the kernel must be as large "
            "as the stride, or larger by an even number."
        )
    return BandFields(top["channels"], unet, schedule, processor)


def demucs_bag(text: str, origin: str) -> dict[str, Any]:
    """`htdemucs.yaml`: the models' names, and optionally their weights and their segment's length.

    Raises:
        WeightsError: a field is missing, of another kind or out of its range, or the weights cancel out.
    """
    bag = checked(expanded(text, origin), known.DEMUCS_BAG, "", origin, others=True)
    weights = bag.get("weights")
    if weights is not None:
        sums = [sum(column) for column in zip(*weights, strict=False)]
        if len(weights) != len(bag["models"]) or len({len(row) for row in weights}) > 1 or 0 in sums:
            raise WeightsError(
                f"{origin} has weights {shown(weights)}; each of the {len(bag['models'])} models must have "
                "one for each stem, which do not cancel out."
            )
    return bag


def check_demucs(arguments: Mapping[str, Any], origin: str) -> None:
    """Arguments of a Demucs class by their names, as its file has them.

    Raises:
        WeightsError: one is of another kind or out of its range, or layers are too wide.
    """
    own = checked(arguments, known.DEMUCS, "", origin, others=True)
    for name, value in arguments.items():
        if name not in known.DEMUCS and not known.DEMUCS_OTHER.accepts(value):
            raise WeightsError(f"{origin} has {name} {shown(value)}; it must be {known.DEMUCS_OTHER}.")
    width = own.get("channels", 64) * max(1, own.get("growth", 2)) ** (own.get("depth", 6) - 1)
    if width > known.MAX_DEMUCS_WIDTH:
        raise WeightsError(
            f"{origin} has layers of {width:g} channels; at most {known.MAX_DEMUCS_WIDTH} are accepted."
        )
