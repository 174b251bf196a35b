"""The inputs in a Cog schema: checks values against their types, bounds and choices, and describes them."""

import math
import textwrap
from typing import Any

from musicgen_svc.runtime.json_object import Json


def fields(schema: Json | None) -> dict[str, Json] | None:
    """Returns the inputs in their order: name -> field, with its choices. None: the schema has no inputs."""
    schemas = (schema or {}).get("components", {}).get("schemas", {})
    properties = schemas.get("Input", {}).get("properties")
    if properties is None:
        return None
    ordered = sorted(properties.items(), key=lambda item: item[1].get("x-order", 0))
    return {name: _resolved(field, schemas) for name, field in ordered}


def _resolved(field: Json, schemas: Json) -> Json:
    """A field with the enumeration that it refers to."""
    references = [part.get("$ref", "") for part in field.get("allOf", [])]
    choices: Json = schemas.get(references[0].rpartition("/")[2], {}) if references else {}
    return choices | field


def is_file(field: Json) -> bool:
    """Whether a field takes a file."""
    return field.get("format") == "uri"


def impossible_input(schema: Json | None) -> Json | None:
    """Makes an `input` that the schema refuses. None: there is no schema, or it refuses nothing for sure."""
    for name, field in (fields(schema) or {}).items():
        if field.get("type") in ("integer", "number", "boolean"):
            return {name: "of another type"}
    return None


def parsed(text: str, field: Json) -> Any:
    """Converts text to the JSON type of a field. Returns the text itself if that is not possible."""
    kind = field.get("type")
    if kind == "boolean" and text.lower() in ("true", "false"):
        return text.lower() == "true"
    for parse in (int, float) if kind in ("integer", "number") else ():
        try:
            number = parse(text)
        except ValueError:
            continue
        if math.isfinite(number):  # JSON has neither NaN nor infinity
            return number
    return text


def fits(value: Any, field: Json) -> bool:
    """Whether the schema allows a value that `parsed` returned. An unknown type allows every value."""
    if "enum" in field:
        return value in field["enum"]
    kind = field.get("type")
    if kind == "boolean":
        return isinstance(value, bool)
    if kind not in ("integer", "number"):
        return True
    if not isinstance(value, int | float) or (kind == "integer" and value != int(value)):
        return False
    return bool(field.get("minimum", value) <= value <= field.get("maximum", value))


def expectation(field: Json) -> str:
    """Describes what a field accepts, such as "a whole number from 1 to 600"."""
    if "enum" in field:
        return "one of " + ", ".join(map(str, field["enum"]))
    if is_file(field):
        return "@FILE, an http(s) URL or a data URI"
    kind = {"boolean": "true or false", "integer": "a whole number", "number": "a number"}.get(
        str(field.get("type")), "text"
    )
    low, high = field.get("minimum"), field.get("maximum")
    if low is not None and high is not None:
        return f"{kind} from {low} to {high}"
    if low is not None:
        return f"{kind}, at least {low}"
    return kind if high is None else f"{kind}, at most {high}"


def described(schema: Json) -> str:
    """Describes every input, its default and what it accepts, in lines of up to 79 columns."""
    lines = []
    for name, field in (fields(schema) or {}).items():
        default = field.get("default")
        shown = str(default).lower() if isinstance(default, bool) else default
        head = expectation(field) + ("" if default is None else f"; default {shown}")
        wrapped = textwrap.wrap(f"{name}: {head}", 79, initial_indent="  ", subsequent_indent="      ")
        lines += wrapped + textwrap.wrap(
            field.get("description", ""), 79, initial_indent="      ", subsequent_indent="      "
        )
    return "\n".join(lines)
