"""openapi_schema.json is what Cog would write for predict.py, and agrees with the contract."""

import re
from collections.abc import Iterator

import pytest
from jsonschema import Draft7Validator

from musicgen_svc.cli import schema
from musicgen_svc.runtime.json_object import Json
from tests.cli.repository import ROOT, SCHEMA

SCHEMAS = SCHEMA["components"]["schemas"]
INPUT = Draft7Validator({"$ref": "#/components/schemas/Input", **SCHEMA})


# As Cog 0.23.1 writes them, without the descriptions.
FIELDS: Json = {
    "model_version": {"allOf": [{"$ref": "#/components/schemas/model_version"}], "default": "finetuned"},
    "prompt": {"default": None, "nullable": True, "title": "Prompt", "type": "string"},
    "input_audio": {
        "default": None, "format": "uri", "nullable": True, "title": "Input Audio", "type": "string",
    },
    "duration": {"default": 8, "maximum": 600, "minimum": 1, "title": "Duration", "type": "integer"},
    "continuation": {"default": False, "title": "Continuation", "type": "boolean"},
    "continuation_start": {"default": 0, "minimum": 0, "title": "Continuation Start", "type": "integer"},
    "continuation_end": {
        "default": None, "minimum": -1, "nullable": True, "title": "Continuation End", "type": "integer",
    },
    "multi_band_diffusion": {"default": False, "title": "Multi Band Diffusion", "type": "boolean"},
    "normalization_strategy": {
        "allOf": [{"$ref": "#/components/schemas/normalization_strategy"}], "default": "loudness",
    },
    "top_k": {"default": 250, "minimum": 0, "title": "Top K", "type": "integer"},
    "top_p": {"default": 0, "maximum": 1, "minimum": 0, "title": "Top P", "type": "number"},
    "temperature": {"default": 1, "maximum": 10, "minimum": 0, "title": "Temperature", "type": "number"},
    "classifier_free_guidance": {
        "default": 3, "maximum": 20, "minimum": 0, "title": "Classifier Free Guidance", "type": "integer",
    },
    "output_format": {"allOf": [{"$ref": "#/components/schemas/output_format"}], "default": "wav"},
    "seed": {
        "default": None, "maximum": 4294967295, "minimum": -1, "nullable": True, "title": "Seed",
        "type": "integer",
    },
}  # fmt: skip
ENUMS = {
    "model_version": ["melody", "small", "medium", "large", "encode-decode", "finetuned"],
    "normalization_strategy": ["loudness", "clip", "peak", "rms"],
    "output_format": ["wav", "mp3"],
}

# The request bodies that clients of the two systems send today.
EIGHT_SONGS: Json = {
    "prompt": "a funky bass line",
    "input_audio": "https://example.org/clip.mp3",
    "duration": 8,
    "continuation": False,
    "continuation_start": 0,
    "continuation_end": -1,
    "multi_band_diffusion": False,
    "normalization_strategy": "loudness",
    "top_k": 250,
    "top_p": 0,
    "temperature": 1,
    "classifier_free_guidance": 3,
    "output_format": "wav",
    "seed": -1,
}
SONIC = {name: value for name, value in EIGHT_SONGS.items() if name != "multi_band_diffusion"}


def test_the_file_is_in_step_with_predict_py() -> None:
    assert (ROOT / "openapi_schema.json").read_text() == schema.render(), "run scripts/schema"


def test_every_input_has_the_shape_that_cog_gives_it() -> None:
    properties = SCHEMAS["Input"]["properties"]
    assert list(properties) == list(FIELDS)
    for order, (name, field) in enumerate(properties.items()):
        description = field["description"]
        assert description.endswith(".")
        assert field == {**FIELDS[name], "description": description, "x-order": order}
        assert list(field) == sorted(field)
    assert {key: SCHEMAS["Input"][key] for key in ("title", "type")} == {"title": "Input", "type": "object"}
    assert "required" not in SCHEMAS["Input"]


def test_choices_are_enumerations_of_their_own() -> None:
    for name, values in ENUMS.items():
        assert SCHEMAS[name] == {
            "description": "An enumeration.", "enum": values, "title": name, "type": "string",
        }  # fmt: skip


def test_the_output_is_one_uri() -> None:
    assert SCHEMAS["Output"] == {"type": "string", "format": "uri", "title": "Output"}


def references(node: object) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from [value] if key == "$ref" else references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def test_the_document_is_sound_openapi() -> None:
    assert SCHEMA["openapi"] == "3.0.2"
    assert SCHEMA["info"] == {"title": "Cog", "version": "0.23.1"}
    assert set(SCHEMA["paths"]) == {
        "/", "/health-check", "/predictions", "/predictions/{prediction_id}/cancel",
    }  # fmt: skip
    for reference in references(SCHEMA):
        assert reference.removeprefix("#/components/schemas/") in SCHEMAS
    for own in SCHEMAS.values():
        Draft7Validator.check_schema(own)
    operations = [operation for path in SCHEMA["paths"].values() for operation in path.values()]
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    for path, methods in SCHEMA["paths"].items():
        for operation in methods.values():
            assert operation["responses"]["200"]["description"]
            declared = {parameter["name"] for parameter in operation.get("parameters", [])}
            assert declared == set(re.findall(r"{(\w+)}", path))


@pytest.mark.parametrize("body", [EIGHT_SONGS, SONIC, {"prompt": "a funky bass line"}, {}])
def test_requests_of_both_systems_are_valid(body: Json) -> None:
    assert list(INPUT.iter_errors(body)) == []


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in ENUMS.items() for value in values]
)
def test_every_option_of_both_systems_is_valid(name: str, value: str) -> None:
    assert INPUT.is_valid({**SONIC, name: value})


def test_the_defaults_are_valid() -> None:
    defaults = {name: field["default"] for name, field in FIELDS.items() if field["default"] is not None}
    assert INPUT.is_valid(defaults)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_version", "huge"),
        ("prompt", True),
        ("prompt", None),  # a field may be left out, but an explicit null is refused
        ("duration", 0),
        ("duration", 601),
        ("duration", 8.5),
        ("continuation", "yes"),
        ("continuation_start", -1),
        ("continuation_end", -2),
        ("normalization_strategy", "none"),
        ("top_k", -1),
        ("top_p", 1.01),
        ("temperature", -0.1),
        ("temperature", 10.5),
        ("classifier_free_guidance", 21),
        ("output_format", "flac"),
        ("seed", -2),
        ("seed", 4294967296),
    ],
)
def test_what_the_contract_excludes_is_invalid(name: str, value: object) -> None:
    assert not INPUT.is_valid({**EIGHT_SONGS, name: value})


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("default=250", "default=K"),
        ("default=250,", ""),
        ("le=600", "lt=600"),
        ("duration: int", "duration: Seconds"),
        ("seed: int | None", "seed: int"),
        ("= Input(", "= cog.Input("),
        ("-> Path:", "-> Path | None:"),
        ("-> Path:", ":"),
        ("async def run(", "async def predict("),
    ],
)
def test_what_cog_would_drop_stops_the_script(good: str, bad: str) -> None:
    source = (ROOT / "predict.py").read_text()
    assert good in source
    with pytest.raises(schema.SourceError):
        schema.document(source.replace(good, bad), "0")
