"""Turns the fifteen fields of the contract into a frozen Request, or refuses them with one sentence.

All rules on fields are in this module, including those that Cog's schema also has, so that a service that
runs without the schema refuses the same requests.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Literal, get_args

from musicgen_svc.engine.sampling_params import SamplingParams
from musicgen_svc.errors import InputError

ModelVersion = Literal["melody", "small", "medium", "large", "encode-decode", "finetuned"]
LANGUAGE_MODELS = tuple(name for name in get_args(ModelVersion) if name != "encode-decode")
Normalization = Literal["loudness", "clip", "peak", "rms"]
OutputFormat = Literal["wav", "mp3"]

MAX_PROMPT_CHARACTERS = 2000
MAX_SEED = 2**32 - 1
MAX_DURATION_S = 600
MAX_TOP_K = 2**31 - 1
"""More entries than any codebook has, so a larger value has the same effect."""


class Mode(Enum):
    """What a request asks for."""

    TEXT = "text"
    MELODY = "melody"
    CONTINUATION = "continuation"
    ENCODE_DECODE = "encode-decode"


@dataclass(frozen=True)
class Request:
    """One valid request. Its seed is set: the same request on the same machine gives the same bytes."""

    model: ModelVersion
    prompt: str | None
    input_audio: Path | None
    duration_s: int
    continuation: bool
    start_s: int
    end_s: int | None
    """None: up to the end of the clip."""
    multi_band_diffusion: bool
    normalization: Normalization
    sampling: SamplingParams
    output_format: OutputFormat
    seed: int

    @property
    def mode(self) -> Mode:
        """What the combination of model, clip and `continuation` asks for."""
        if self.model == "encode-decode":
            return Mode.ENCODE_DECODE
        if self.input_audio is None:
            return Mode.TEXT
        return Mode.CONTINUATION if self.continuation else Mode.MELODY

    @classmethod
    def from_fields(cls, fields: Mapping[str, object], max_duration_s: int = MAX_DURATION_S) -> "Request":
        """Checks the fields and makes a request of them. Draws a seed if none is given.

        Args:
            fields: all fields of the contract by their names.
            max_duration_s: the operator's limit for `duration`.

        Raises:
            InputError: no mode accepts a value, or the combination of values.
        """
        end_s = _integer(fields, "continuation_end", -1, None)
        seed = _integer(fields, "seed", -1, MAX_SEED)
        request = cls(
            model=_choice(fields, "model_version", get_args(ModelVersion)),
            prompt=_prompt(fields),
            input_audio=_input_audio(fields),
            duration_s=_required_integer(fields, "duration", 1, min(max_duration_s, MAX_DURATION_S)),
            continuation=bool(fields["continuation"]),
            start_s=_required_integer(fields, "continuation_start", 0, None),
            end_s=None if end_s == -1 else end_s,
            multi_band_diffusion=bool(fields["multi_band_diffusion"]),
            normalization=_choice(fields, "normalization_strategy", get_args(Normalization)),
            sampling=SamplingParams(
                top_k=min(_required_integer(fields, "top_k", 0, None), MAX_TOP_K),
                top_p=_number(fields, "top_p", 0, 1),
                temperature=_number(fields, "temperature", 0, 10),
                guidance=_required_integer(fields, "classifier_free_guidance", 0, 20),
            ),
            output_format=_choice(fields, "output_format", get_args(OutputFormat)),
            seed=secrets.randbelow(MAX_SEED + 1) if seed in (None, -1) else seed,
        )
        request._check_combination()
        return request

    def _check_combination(self) -> None:
        """Checks that the fields without which the mode makes no sense are given."""
        if self.input_audio is None:
            if self.model == "encode-decode":
                raise InputError(
                    "model_version 'encode-decode' needs input_audio: the audio to encode and decode."
                )
            if self.continuation:
                raise InputError(
                    "continuation is true but input_audio is missing: give the audio to continue."
                )
            if self.prompt is None:
                raise InputError("prompt and input_audio are both missing: give at least one of them.")


def _prompt(fields: Mapping[str, object]) -> str | None:
    """Returns the prompt; None for an empty one."""
    prompt = fields["prompt"]
    if prompt is None:
        return None
    if not isinstance(prompt, str):
        raise InputError(f"prompt is {prompt!r}; it must be a string.")
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise InputError(
            f"prompt has {len(prompt)} characters; at most {MAX_PROMPT_CHARACTERS} are accepted."
        )
    return prompt if prompt.strip() else None


def _input_audio(fields: Mapping[str, object]) -> Path | None:
    """Returns the file of `input_audio`, which Cog has fetched or decoded.

    Cog passes on a string unchanged that it does not recognize as a URL or data URI, also if its scheme has
    capital letters. It is refused: to open it would let a client read the server's files, and to fetch it
    would bypass the limits of Cog's own fetching.
    """
    value = fields["input_audio"]
    if value is not None and not isinstance(value, Path):
        scheme = str(value).strip().partition(":")[0]
        if scheme != scheme.lower() and scheme.lower() in ("http", "https", "data"):
            raise InputError(
                f"input_audio is {_short(value)}, which Cog does not fetch or decode: it must begin with "
                f"{scheme.lower()}: in lower case."
            )
        raise InputError(
            f"input_audio is {_short(value)}; it must be an http(s) URL or a data URI of an audio file."
        )
    return value


def _choice[T: str](fields: Mapping[str, object], name: str, choices: tuple[T, ...]) -> T:
    """Returns a field's value, which must be one of `choices`."""
    for choice in choices:
        if fields[name] == choice:
            return choice
    raise InputError(f"{name} is {_short(fields[name])}; it must be one of {', '.join(choices)}.")


def _integer(fields: Mapping[str, object], name: str, low: int, high: int | None) -> int | None:
    """Returns a field's value as an integer within [low, high], or None if it is null."""
    if fields[name] is None:
        return None
    number = _number(fields, name, low, high)
    if not number.is_integer():  # Cog accepts 8.0 as an `integer` and passes a float
        raise InputError(f"{name} is {number}; it must be a whole number.")
    return int(number)


def _required_integer(fields: Mapping[str, object], name: str, low: int, high: int | None) -> int:
    """Returns a field's value as an integer within [low, high]; null is refused."""
    number = _integer(fields, name, low, high)
    if number is None:
        raise InputError(f"{name} is null; it must be a whole number.")
    return number


def _number(fields: Mapping[str, object], name: str, low: float, high: float | None) -> float:
    """Returns a field's value as a number within [low, high]; a `high` of None: without an upper bound."""
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{name} is {_short(value)}; it must be a number.")
    if not (low <= value and (high is None or value <= high)):  # also refuses NaN
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise InputError(f"{name} is {value}; it must be {bounds}.")
    return float(value)


def _short(value: object) -> str:
    """Returns a value as it is shown in a message: at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
