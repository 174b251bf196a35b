"""Writes openapi_schema.json: what `cog build` would make of predict.py, without Cog's Go program.

Only the text of predict.py is read, as Cog does it, and only what Cog would understand is accepted:
anything else stops here, where Cog would drop it without a word. tests/test_predict_source.py holds
the rules that are a matter of style.
"""

import ast
import json
import sys
from pathlib import Path
from typing import Any

import yaml

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


class SourceError(Exception):
    """predict.py holds something that Cog's parser does not understand."""


def document(source: str, cog_version: str) -> dict[str, Any]:
    """The OpenAPI 3.0.2 document of the class `Predictor` in `source`.

    Raises:
        SourceError: an input is not written as Cog needs it.
    """
    run = _run_method(ast.parse(source))
    properties: dict[str, Any] = {}
    enums: dict[str, Any] = {}
    parameters = run.args.args[1:]  # without self
    if len(run.args.defaults) != len(parameters):
        raise SourceError("every input needs a default: = Input(default=...)")
    for order, (parameter, default) in enumerate(zip(parameters, run.args.defaults, strict=True)):
        name = parameter.arg
        options = _options(name, default)
        kind, nullable = _annotation(name, parameter.annotation)
        if options["default"] is None and not nullable:
            raise SourceError(f"{name}: the default is None and the type is not Optional")
        field: dict[str, Any] = {
            "x-order": order,
            "default": _number(options["default"]),
            "description": options["description"],
        }
        if nullable:
            field["nullable"] = True
        for bound in BOUNDS.keys() & options.keys():
            field[BOUNDS[bound]] = _number(options[bound])
        if "choices" in options:
            field["allOf"] = [{"$ref": REFERENCE + name}]
            enums[name] = {
                "description": "An enumeration.",
                "enum": options["choices"],
                "title": name,
                **TYPES[kind],
            }
        else:
            field |= {"title": _title(name), **TYPES[kind]}
        properties[name] = dict(sorted(field.items()))
    output, optional = _annotation("the output", run.returns)
    if optional:
        raise SourceError("the output must not be Optional")
    return {
        "openapi": "3.0.2",
        "info": {"title": "Cog", "version": cog_version},
        "paths": _paths(),
        "components": {
            "schemas": {
                "Input": {"properties": properties, "title": "Input", "type": "object"},
                "Output": {"title": "Output", **TYPES[output]},
                **enums,
                **_envelope(),
            }
        },
    }


def _run_method(tree: ast.Module) -> ast.FunctionDef | ast.AsyncFunctionDef:
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == "Predictor":
            for member in node.body:
                if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef) and member.name == "run":
                    return member
    raise SourceError("there is no class Predictor with a method run")


def _options(name: str, call: ast.expr) -> dict[str, Any]:
    """The keyword arguments of an `Input(...)`, each a literal."""
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "Input"):
        raise SourceError(f"{name}: the default must be Input(...), imported by that name")
    if call.args:
        raise SourceError(f"{name}: Input takes keywords only")
    options: dict[str, Any] = {}
    for keyword in call.keywords:
        if keyword.arg is None:
            raise SourceError(f"{name}: Input takes no **")
        try:
            options[keyword.arg] = ast.literal_eval(keyword.value)
        except ValueError:
            raise SourceError(f"{name}: {keyword.arg} is not a literal") from None
    if unknown := options.keys() - {"default", "description", "choices", *BOUNDS}:
        raise SourceError(f"{name}: {', '.join(map(str, unknown))} is not supported here")
    if missing := {"default", "description"} - options.keys():
        raise SourceError(f"{name}: {', '.join(missing)} is missing")
    return options


def _annotation(name: str, node: ast.expr | None) -> tuple[str, bool]:
    """`int` -> ("int", False); `int | None` and `Optional[int]` -> ("int", True)."""
    text = ast.unparse(node) if node else ""
    kind = text.removesuffix(" | None")
    if text.startswith("Optional["):
        kind = text.removeprefix("Optional[").removesuffix("]")
    if kind not in TYPES:
        raise SourceError(f"{name}: the type {text or '(none)'} is not one of {', '.join(TYPES)}")
    return kind, kind != text


def _number(value: Any) -> Any:
    """1.0 as 1: Cog's JSON knows no difference."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _title(name: str) -> str:
    return " ".join(word[:1].upper() + word[1:] for word in name.split("_"))


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _response(description: str, schema: dict[str, Any]) -> dict[str, Any]:
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
    return {"title": title, "type": "object", "properties": properties}


def _envelope() -> dict[str, Any]:
    """What goes around inputs and outputs, the same for every model."""

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
    """The text of openapi_schema.json, from the files in the repository."""
    version = yaml.safe_load((ROOT / "cog.yaml").read_text())["build"]["sdk_version"]
    return json.dumps(document(SOURCE.read_text(), version), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    try:
        SCHEMA.write_text(render())
    except SourceError as error:
        sys.exit(f"predict.py: {error}")
    print(f"wrote {SCHEMA.name}")
