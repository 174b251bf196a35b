"""Configurations of what stands beside a language model: T5, its tokenizer, EnCodec in transformers' format."""

import math
from collections.abc import Mapping
from typing import Any

import musicgen_svc.checkpoints.known_fields as known
from musicgen_svc.checkpoints.configs import check_stack
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
                f"{origin} has target_bandwidths with {bandwidth:g} kbit/s, which is {codebooks:.6g} codebooks; "
                f"1 to {_MAX_CODEBOOKS} are accepted."
            )
    greatest, rounded_up = max(own["target_bandwidths"]), math.ceil(rate)
    if int(greatest * 1000 / (rate * bits)) != 1000 * own["target_bandwidths"][-1] // (rounded_up * bits):
        raise WeightsError(
            f"{origin} has target_bandwidths {shown(own['target_bandwidths'])}; the last must be the greatest, "
            f"and as many codebooks at {rounded_up} frames a second."
        )
    return own
