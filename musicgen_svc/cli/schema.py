"""`scripts/schema`: writes openapi_schema.json, which `cog build` would write for predict.py.

It is made without Cog's Go program, from the text of predict.py alone.
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

from musicgen_svc.cli.predict_source import OUTPUT_TYPE, InputField, SourceError, read_inputs

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "predict.py"
SCHEMA = ROOT / "openapi_schema.json"

TYPES: dict[str, dict[str, str]] = {
    "str": {"type": "string"},
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "bool": {"type": "boolean"},
    "Path": {"type": "string", "format": "uri"},
}
BOUNDS = {"ge": "minimum", "le": "maximum"}
REFERENCE = "#/components/schemas/"


def document(source: str, cog_version: str) -> dict[str, Any]:
    """Makes the OpenAPI 3.0.2 document of the service.

    Args:
        source: the text of predict.py.
        cog_version: the version of Cog that the document names.

    Raises:
        SourceError: Cog would not understand an input, or not as it is meant.
    """
    inputs = read_inputs(source)
    properties = {field.name: _property(order, field) for order, field in enumerate(inputs)}
    enums = {field.name: _enum(field) for field in inputs if "choices" in field.options}
    return {
        "openapi": "3.0.2",
        "info": {"title": "Cog", "version": cog_version},
        "paths": _paths(),
        "components": {
            "schemas": {
                "Input": {"properties": properties, "title": "Input", "type": "object"},
                "Output": {"title": "Output", **TYPES[OUTPUT_TYPE]},
                **enums,
                **_envelope(),
            }
        },
    }


def _property(order: int, field: InputField) -> dict[str, Any]:
    """The schema of one input, its keys in alphabetical order as Cog has them."""
    options = field.options
    made: dict[str, Any] = {
        "x-order": order,
        "default": _number(options["default"]),
        "description": options["description"],
    }
    if field.nullable:
        made["nullable"] = True
    for bound in BOUNDS.keys() & options.keys():
        made[BOUNDS[bound]] = _number(options[bound])
    if "choices" in options:
        made["allOf"] = [{"$ref": REFERENCE + field.name}]
    else:
        made |= {"title": _title(field.name), **TYPES[field.type]}
    return dict(sorted(made.items()))


def _enum(field: InputField) -> dict[str, Any]:
    """The enumeration that an input with choices refers to."""
    return {
        "description": "An enumeration.",
        "enum": field.options["choices"],
        "title": field.name,
        **TYPES[field.type],
    }


def _number(value: Any) -> Any:
    """Turns 1.0 into 1, because Cog writes both as 1."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _title(name: str) -> str:
    """Turns "top_k" into "Top K"."""
    return " ".join(word[:1].upper() + word[1:] for word in name.split("_"))


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    """A body that is JSON of this schema."""
    return {"application/json": {"schema": schema}}


def _response(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    """A response whose body is JSON of this schema."""
    return {"description": description, "content": _json(schema)}


def _paths() -> dict[str, Any]:
    """The routes that Cog lists for every model."""
    anything = _response("Successful Response", {})
    invalid = _response("Validation Error", {"$ref": REFERENCE + "HTTPValidationError"})
    return {
        "/": {"get": {"summary": "Root", "operationId": "root__get", "responses": {"200": anything}}},
        "/health-check": {
            "get": {
                "summary": "Healthcheck",
                "operationId": "healthcheck_health_check_get",
                "responses": {"200": anything},
            }
        },
        "/predictions": {
            "post": {
                "summary": "Predict",
                "description": "Run a single prediction on the model",
                "operationId": "predict_predictions_post",
                # Without this Cog refuses `Accept: text/event-stream`. `cog build` does not write it itself.
                "x-cog-streaming": True,
                "requestBody": {"content": _json({"$ref": REFERENCE + "PredictionRequest"})},
                "responses": {
                    "200": _response("Successful Response", {"$ref": REFERENCE + "PredictionResponse"}),
                    "422": invalid,
                },
            }
        },
        "/predictions/{prediction_id}/cancel": {
            "post": {
                "summary": "Cancel",
                "operationId": "cancel_predictions__prediction_id__cancel_post",
                "parameters": [
                    {
                        "in": "path",
                        "name": "prediction_id",
                        "required": True,
                        "schema": {"title": "Prediction Id", "type": "string"},
                    }
                ],
                "responses": {"200": anything, "422": invalid},
            }
        },
    }


def _object(title: str, properties: dict[str, Any]) -> dict[str, Any]:
    """A schema with named properties."""
    return {"title": title, "type": "object", "properties": properties}


def _envelope() -> dict[str, Any]:
    """The schemas of requests, responses and errors, which are the same for every model."""

    def text(title: str, **more: str) -> dict[str, str]:
        return {"title": title, "type": "string", **more}

    prediction = {
        "input": {"$ref": REFERENCE + "Input"},
        "output": {"$ref": REFERENCE + "Output"},
        "id": text("Id"),
        "version": text("Version"),
        "created_at": text("Created At", format="date-time"),
        "started_at": text("Started At", format="date-time"),
        "completed_at": text("Completed At", format="date-time"),
        "status": text("Status"),
        "error": text("Error"),
        "logs": text("Logs"),
        "metrics": {"title": "Metrics", "type": "object"},
    }
    location = {"anyOf": [{"type": "string"}, {"type": "integer"}]}
    return {
        "PredictionRequest": _object("PredictionRequest", {key: prediction[key] for key in ("id", "input")}),
        "PredictionResponse": _object("PredictionResponse", prediction),
        "Status": {
            "title": "Status",
            "description": "An enumeration.",
            "enum": ["starting", "processing", "succeeded", "canceled", "failed"],
            "type": "string",
        },
        "HTTPValidationError": _object(
            "HTTPValidationError",
            {
                "detail": {
                    "title": "Detail",
                    "type": "array",
                    "items": {"$ref": REFERENCE + "ValidationError"},
                }
            },
        ),
        "ValidationError": {
            **_object(
                "ValidationError",
                {
                    "loc": {"title": "Location", "type": "array", "items": location},
                    "msg": text("Message"),
                    "type": text("Error Type"),
                },
            ),
            "required": ["loc", "msg", "type"],
        },
    }


def render() -> str:
    """Makes the text of openapi_schema.json from predict.py and cog.yaml."""
    version = yaml.safe_load((ROOT / "cog.yaml").read_text())["build"]["sdk_version"]
    return json.dumps(document(SOURCE.read_text(), version), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    try:
        SCHEMA.write_text(render())
    except SourceError as error:
        sys.exit(f"predict.py: {error}")
    print(f"wrote {SCHEMA.name}")
