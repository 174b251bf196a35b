"""Reads and checks the configurations of transformers' EnCodec, T5, Demucs and MultiBand Diffusion."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import musicgen_svc.checkpoints.part_field_tables as tables
from musicgen_svc.checkpoints.configs import check_codec_stack
from musicgen_svc.checkpoints.expansion import expand
from musicgen_svc.checkpoints.field_types import quoted, read_fields
from musicgen_svc.errors import WeightsError

_MAX_CODEBOOKS = 64


def t5_fields(config: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The arguments of `T5Encoder`, from the fields of transformers' `T5Config`.

    Raises:
        WeightsError: a field has another type or is out of its range, or the buckets of the positions do not
            fit their greatest distance.
    """
    fields = read_fields(config, tables.T5, "", origin, skip_unknown=True)
    count, farthest = fields["relative_attention_num_buckets"], fields["relative_attention_max_distance"]
    if count % 2 or farthest <= count // 4:
        raise WeightsError(
            f"{origin} has relative_attention_num_buckets {count} and relative_attention_max_distance "
            f"{farthest}; the first must be even, and the second more than a quarter of it."
        )
    return fields


def encodec_fields(config: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The fields that build transformers' `EncodecModel`, from its configuration.

    Raises:
        WeightsError: a field has another type, is out of its range, or contradicts another field.
    """
    own = read_fields(config, tables.TRANSFORMERS_ENCODEC, "", origin, skip_unknown=True)
    check_codec_stack(
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
            f"{origin} has target_bandwidths {quoted(own['target_bandwidths'])}; the last must be the "
            f"greatest, and as many codebooks at {rounded_up} frames a second."
        )
    return own


@dataclass(frozen=True)
class BandFields:
    """The fields that build one band's model of MultiBand Diffusion: one dictionary for each class."""

    channels: int
    unet: dict[str, Any]
    schedule: dict[str, Any]
    processor: dict[str, Any]


def diffusion_fields(package: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The fields `sample_rate` and `n_bands` of audiocraft's file for MultiBand Diffusion.

    Raises:
        WeightsError: a field has another type or is out of its range.
        KeyError, TypeError: it is the file of something else.
    """
    own = {name: package[name] for name in tables.DIFFUSION}
    return read_fields(own, tables.DIFFUSION, "", origin)


def band_fields(config: object, origin: str) -> BandFields:
    """The configuration of one band, from a YAML string or OmegaConf's object.

    Raises:
        WeightsError: a field has another type, is out of its range, or contradicts another field.
    """
    plain = expand(config, origin)
    unet = read_fields(plain.get("diffusion_unet"), tables.DIFFUSION_UNET, "diffusion_unet", origin)
    schedule = read_fields(
        plain.get("schedule"), tables.DIFFUSION_SCHEDULE, "schedule", origin, skip_unknown=True
    )
    processor = read_fields(plain.get("processor"), tables.DIFFUSION_PROCESSOR, "processor", origin)
    top = read_fields(plain, tables.BAND, "", origin, skip_unknown=True)
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
    """The fields of `htdemucs.yaml`: the models' names and, optionally, their weights and segment in seconds.

    Raises:
        WeightsError: a field is missing, has another type or is out of its range, or the weights of a stem
            add up to 0.
    """
    bag = read_fields(expand(text, origin), tables.DEMUCS_BAG, "", origin, skip_unknown=True)
    weights = bag.get("weights")
    if weights is not None:
        sums = [sum(column) for column in zip(*weights, strict=False)]
        if len(weights) != len(bag["models"]) or len({len(row) for row in weights}) > 1 or 0 in sums:
            raise WeightsError(
                f"{origin} has weights {quoted(weights)}; each of the {len(bag['models'])} models must have "
                "one for each stem, which do not cancel out."
            )
    return bag


def check_demucs(arguments: Mapping[str, Any], origin: str) -> None:
    """Checks the arguments of a Demucs class, by name, that its file holds.

    Raises:
        WeightsError: an argument has another type or is out of its range, or layers would be too wide.
    """
    own = read_fields(arguments, tables.DEMUCS, "", origin, skip_unknown=True)
    for name, value in arguments.items():
        if name not in tables.DEMUCS and not tables.DEMUCS_OTHER.accepts(value):
            raise WeightsError(f"{origin} has {name} {quoted(value)}; it must be {tables.DEMUCS_OTHER}.")
    width = own.get("channels", 64) * max(1, own.get("growth", 2)) ** (own.get("depth", 6) - 1)
    if width > tables.MAX_DEMUCS_WIDTH:
        raise WeightsError(
            f"{origin} has layers of {width:g} channels; at most {tables.MAX_DEMUCS_WIDTH} are accepted."
        )
