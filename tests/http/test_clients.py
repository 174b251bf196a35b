"""Clients of the two services that this one replaces, with the requests that their documentation shows."""

import json
from typing import Any

import pytest
from replies import clip, output, samples
from server import ROOT, CogServer

SHARED_DEFAULTS: dict[str, Any] = {
    "duration": 8, "continuation": False, "continuation_start": 0, "normalization_strategy": "loudness",
    "top_k": 250, "top_p": 0, "temperature": 1, "classifier_free_guidance": 3, "output_format": "wav",
}  # fmt: skip


def test_a_client_of_8songs_that_sends_every_documented_field(server: CogServer) -> None:
    """The page has no `model_version`, and no defaults for the optional fields, which are left out."""
    body = SHARED_DEFAULTS | {"prompt": "a waltz", "multi_band_diffusion": False}
    sound, rate = samples(server.predict(body))
    assert sound.shape == (1, 8 * rate)


def test_a_client_of_8songs_that_sends_only_a_prompt(server: CogServer) -> None:
    reply = server.predict({"prompt": "a waltz"})
    assert samples(reply)[0].shape[1] == 8 * 32_000
    assert reply["output"].startswith("data:audio/")


@pytest.mark.parametrize(
    "change",
    [
        {"model_version": "small"},
        {"model_version": "melody"},
        {"model_version": "finetuned"},
        {"model_version": "encode-decode", "input_audio": clip(1.0)},
        {"normalization_strategy": "loudness"},
        {"normalization_strategy": "clip"},
        {"normalization_strategy": "peak"},
        {"normalization_strategy": "rms"},
        {"output_format": "wav"},
        {"output_format": "mp3"},
    ],
    ids=lambda change: "-".join(map(str, change.items()))[:40],
)
def test_a_client_of_sonic_with_each_option_of_each_enum(server: CogServer, change: dict[str, Any]) -> None:
    body = {"model_version": "finetuned", **SHARED_DEFAULTS, "prompt": "a waltz", "duration": 1, "seed": 3}
    sound, rate = samples(server.predict(body | change))
    assert sound.shape == (1, rate)


@pytest.mark.parametrize("model", ["medium", "large"])
def test_a_documented_model_without_weights_says_how_to_get_them(server: CogServer, model: str) -> None:
    reply = server.predict({"prompt": "a waltz", "model_version": model})
    assert reply["status"] == "failed"
    assert f"scripts/download_weights {model}" in reply["error"]


def test_the_served_schema_is_the_committed_one(server: CogServer) -> None:
    served = server.request("GET", "/openapi.json").json()
    committed = json.loads((ROOT / "openapi_schema.json").read_text())
    assert served["components"]["schemas"]["Input"] == committed["components"]["schemas"]["Input"]


def test_outputs_are_files_of_the_kind_that_was_asked_for(server: CogServer) -> None:
    wav = server.predict({"prompt": "x", "duration": 1})
    mp3 = server.predict({"prompt": "x", "duration": 1, "output_format": "mp3"})
    assert wav["output"].startswith("data:audio/") and output(wav)[:4] == b"RIFF"
    assert mp3["output"].startswith("data:audio/mpeg;base64,") and output(mp3)[:3] == b"ID3"
