"""`-i name=value` from the command line -> the JSON that Cog's server takes, as `cog predict -i` does."""

import base64
import contextlib
import math
import mimetypes
from pathlib import Path
from typing import Any

Json = dict[str, Any]


class UsageError(Exception):
    """The command line cannot be acted on: one sentence for the user."""


def request_input(pairs: list[str], schema: Json | None) -> Json:
    """The request's `input`. Without a schema everything is a string, and every `@file` a file.

    Raises:
        UsageError: a pair that is none, a name that is unknown or given twice, an unreadable file.
    """
    fields = _fields(schema) if schema else None
    values: Json = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise UsageError(f"-i {pair}: an input is written name=value.")
        if name in values:
            raise UsageError(f"-i {name}=...: {name} is given twice.")
        if fields is not None and name not in fields:  # Cog would drop it without a word
            raise UsageError(f"There is no input {name!r}; there are {', '.join(fields)}.")
        if len(value) > 1 and value[0] == value[-1] == '"':
            value = value[1:-1]
        values[name] = _value(name, value, fields[name] if fields else {"format": "uri"})
    return values


def impossible_input(schema: Json | None) -> Json | None:
    """An `input` that the schema refuses, or None where there is no such thing."""
    for name, field in (_fields(schema) if schema else {}).items():
        if field.get("type") in ("integer", "number", "boolean"):
            return {name: "of another type"}
    return None


def expanded(path: Path) -> Path:
    """With `~` as a shell reads it; where nobody is called so, it is a name like any other."""
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def _fields(schema: Json) -> dict[str, Json]:
    """The schema's inputs by name, in their order; those with choices are references."""
    schemas = schema["components"]["schemas"]
    properties = sorted(schemas["Input"]["properties"].items(), key=lambda item: item[1].get("x-order", 0))
    return {
        name: schemas[field["allOf"][0]["$ref"].rpartition("/")[2]] if "allOf" in field else field
        for name, field in properties
    }


def _value(name: str, text: str, field: Json) -> Any:
    """`text` as the JSON type that the schema names; what does not parse is the server's to refuse."""
    if text.startswith("@") and field.get("format") == "uri":
        return _data_uri(name, expanded(Path(text[1:])))
    kind = field.get("type")
    if kind == "boolean" and text.lower() in ("true", "false"):
        return text.lower() == "true"
    parsers = {"integer": (int, float), "number": (int, float)}.get(str(kind), ())
    for parse in parsers:
        with contextlib.suppress(ValueError):
            number = parse(text)
            if math.isfinite(number):  # JSON has no other numbers
                return number
    return text


def _data_uri(name: str, path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{name}: cannot read {path}: {error.strerror}.") from None
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
