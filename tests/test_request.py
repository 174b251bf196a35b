"""All rules on fields: which values are accepted, and the sentence for those that are not."""

from pathlib import Path
from typing import Any

import pytest

from musicgen_svc.errors import InputError
from musicgen_svc.request import Mode, Request

DEFAULTS: dict[str, Any] = {
    "model_version": "finetuned", "prompt": None, "input_audio": None, "duration": 8, "continuation": False,
    "continuation_start": 0, "continuation_end": None, "multi_band_diffusion": False,
    "normalization_strategy": "loudness", "top_k": 250, "top_p": 0, "temperature": 1,
    "classifier_free_guidance": 3, "output_format": "wav", "seed": None,
}  # fmt: skip
CLIP = Path("clip")


def request(**fields: Any) -> Request:
    return Request.from_fields(DEFAULTS | fields)


@pytest.mark.parametrize(
    ("fields", "mode"),
    [
        ({"prompt": "a"}, Mode.TEXT),
        ({"input_audio": CLIP}, Mode.MELODY),
        ({"prompt": "a", "input_audio": CLIP}, Mode.MELODY),
        ({"prompt": "a", "input_audio": CLIP, "continuation": True}, Mode.CONTINUATION),
        ({"input_audio": CLIP, "continuation": True}, Mode.CONTINUATION),
        ({"input_audio": CLIP, "model_version": "encode-decode"}, Mode.ENCODE_DECODE),
        ({"input_audio": CLIP, "continuation": True, "model_version": "encode-decode"}, Mode.ENCODE_DECODE),
    ],
)
def test_fields_decide_the_mode(fields: dict[str, Any], mode: Mode) -> None:
    assert request(**fields).mode is mode


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({}, ["prompt", "input_audio"]),
        ({"prompt": ""}, ["prompt", "input_audio"]),
        ({"prompt": " \n"}, ["prompt", "input_audio"]),
        ({"prompt": "x" * 2001}, ["prompt", "2001", "2000"]),
        ({"prompt": "x", "continuation": True}, ["continuation", "input_audio"]),
        ({"model_version": "encode-decode", "prompt": "x"}, ["encode-decode", "input_audio"]),
        ({"input_audio": "/etc/hostname"}, ["input_audio", "/etc/hostname", "URL"]),
        ({"input_audio": "HTTP://host/a.wav"}, ["input_audio", "HTTP://host", "http: in lower case"]),
        ({"input_audio": "Https://host/a.wav"}, ["https: in lower case"]),
        ({"input_audio": "DATA:audio/wav;base64," + 999 * "A"}, ["input_audio", "data: in lower case"]),
        ({"input_audio": "FILE:///etc/hostname"}, ["input_audio", "FILE:", "an http(s) URL or a data URI"]),
        ({"input_audio": CLIP, "continuation_end": -2}, ["continuation_end", "-2", "at least -1"]),
        ({"prompt": "x", "duration": 0}, ["duration", "0", "between 1 and 600"]),
        ({"prompt": "x", "duration": 601}, ["duration", "601", "between 1 and 600"]),
        ({"prompt": "x", "duration": 8.5}, ["duration", "8.5", "whole"]),
        ({"prompt": "x", "duration": True}, ["duration", "True", "number"]),
        ({"prompt": "x", "seed": 2**32}, ["seed", str(2**32), "4294967295"]),
        ({"prompt": "x", "seed": -2}, ["seed", "-2"]),
        ({"prompt": "x", "top_k": -1}, ["top_k", "-1"]),
        ({"prompt": "x", "top_p": float("nan")}, ["top_p", "nan"]),
        ({"prompt": "x", "temperature": 10.1}, ["temperature", "10.1"]),
        ({"prompt": "x", "classifier_free_guidance": 21}, ["classifier_free_guidance", "21"]),
        ({"prompt": "x", "model_version": "huge"}, ["model_version", "huge", "small"]),
        ({"prompt": "x", "output_format": "ogg"}, ["output_format", "ogg", "mp3"]),
        ({"prompt": "x", "normalization_strategy": "x"}, ["normalization_strategy", "peak"]),
    ],
)
def test_bad_fields_are_refused_in_one_sentence(fields: dict[str, Any], names: list[str]) -> None:
    with pytest.raises(InputError) as error:
        request(**fields)
    sentence = str(error.value)
    assert all(name in sentence for name in names), sentence
    assert sentence.endswith(".") and "\n" not in sentence and ". " not in sentence


@pytest.mark.parametrize("seed", [0, 1, 4294967295])
def test_a_seed_is_kept_even_when_it_is_zero(seed: int) -> None:
    assert request(prompt="x", seed=seed).seed == seed


@pytest.mark.parametrize("seed", [None, -1])
def test_without_a_seed_one_is_drawn_that_can_be_given(seed: int | None) -> None:
    drawn = {request(prompt="x", seed=seed).seed for _ in range(20)}
    assert len(drawn) > 15
    assert all(request(prompt="x", seed=s).seed == s for s in drawn)


def test_whole_floats_are_integers() -> None:
    settled = request(prompt="x", duration=8.0, top_k=250.0, seed=7.0)
    assert (settled.duration_s, settled.sampling.top_k, settled.seed) == (8, 250, 7)
    assert isinstance(settled.seed, int)


def test_minus_one_and_null_mean_the_end_of_the_clip() -> None:
    assert request(input_audio=CLIP, continuation_end=-1, continuation_start=90).end_s is None
    assert request(input_audio=CLIP, continuation_start=90).end_s is None


def test_a_prompt_is_not_changed() -> None:
    prompt = "  épique 🎵 שלום \x00 \n"
    assert request(prompt=prompt).prompt == prompt


def test_an_operator_may_lower_the_longest_duration() -> None:
    with pytest.raises(InputError, match="between 1 and 30"):
        Request.from_fields(DEFAULTS | {"prompt": "x", "duration": 31}, max_duration_s=30)


def test_a_very_large_top_k_becomes_one_that_fits_into_32_bits() -> None:
    assert request(prompt="x", top_k=10**30).sampling.top_k == 2**31 - 1
    assert request(prompt="x", top_k=250).sampling.top_k == 250
