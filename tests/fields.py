"""The fields of one request, as Cog passes them to the service: one second of a waltz."""

from typing import Any

FIELDS: dict[str, Any] = {
    "model_version": "finetuned", "prompt": "a waltz", "input_audio": None, "duration": 1,
    "continuation": False, "continuation_start": 0, "continuation_end": None, "multi_band_diffusion": False,
    "normalization_strategy": "loudness", "top_k": 250, "top_p": 0, "temperature": 1,
    "classifier_free_guidance": 3, "output_format": "wav", "seed": 5,
}  # fmt: skip
