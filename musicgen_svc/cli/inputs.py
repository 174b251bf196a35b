"""Inputs on the command line: turns `-i name=value` into the JSON that a Cog server accepts."""

import base64
import binascii
import mimetypes
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

from musicgen_svc.cli.schema_fields import expectation, fields, fits, is_file, parsed
from musicgen_svc.runtime.json_object import Json

MAX_FILE_BYTES = 75 * 2**20
"""The largest file that fits into a request: Cog accepts a body of 100 MiB, and base64 adds a third."""


class UsageError(Exception):
    """The command line cannot be used. The message is one sentence for the user."""


def request_input(pairs: list[str], schema: Json | None) -> Json:
    """Makes the request's `input`.

    Args:
        pairs: each "name=value".
        schema: of the server. None: every value is a string, and every `@file` a file.

    Raises:
        UsageError: a pair has no "=", a name is unknown or given twice, the schema does not allow a value, or
        a
            file cannot be read.
    """
    known = fields(schema)
    values: Json = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise UsageError(f"-i {_short(pair)}: an input is written name=value.")
        if name in values:
            raise UsageError(f"-i {name}=...: {name} is given twice.")
        if known is not None and name not in known:  # Cog would ignore it without a message
            raise UsageError(f"There is no input {name!r}; there are {', '.join(known)}.")
        values[name] = _value(
            name, text, known[name] if known else {"format": "uri"}, strict=known is not None
        )
    required = (schema or {}).get("components", {}).get("schemas", {}).get("Input", {}).get("required", [])
    if missing := [name for name in required if name not in values]:
        raise UsageError(f"The input {missing[0]} is missing: give it as -i {missing[0]}=VALUE.")
    return values


def checked_url(url: str) -> str:
    """Checks a server's URL and returns it.

    Raises:
        UsageError: this is no http(s) URL.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        raise UsageError(f"--url {url}: a server's URL begins with its scheme: write http://{url}")
    if scheme.lower() not in ("http", "https"):
        raise UsageError(f"--url {url}: the scheme is {scheme!r}; write http://{rest} or https://{rest}")
    if problem := _url_problem(url):
        raise UsageError(f"--url {url}: {problem}; write http://HOST:PORT.")
    return url


def expanded(path: Path) -> Path:
    """Replaces `~` at the start as a shell does. If there is no such user, the path stays as it is."""
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def _value(name: str, text: str, field: Json, strict: bool) -> Any:
    """Makes one input's JSON value. `strict`: whether a value that is not @FILE must fit the field."""
    if text.startswith("@"):
        path = expanded(Path(text[1:]))
        if is_file(field):
            return _data_uri(name, path)
        if field.get("type") == "string" and "enum" not in field:
            return _text(name, path)
    if len(text) > 1 and text[0] == text[-1] == '"':
        text = text[1:-1]
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"{name}: the value is not UTF-8 text; write it in a UTF-8 terminal or file."
        ) from None
    if is_file(field):
        return _uri(name, text) if strict else text
    value = parsed(text, field)
    if not fits(value, field):
        raise UsageError(f"{name} is {_short(text)}; it must be {expectation(field)}.")
    return value


def _uri(name: str, text: str) -> str:
    """Checks a URL or a data URI, and writes its scheme in lower case, because Cog knows no other.

    Raises:
        UsageError: the text is neither, or nothing can be read from it.
    """
    scheme, colon, rest = text.partition(":")
    scheme = scheme.lower()
    if colon and scheme == "data":
        return f"data:{_checked_data(name, rest)}"
    if colon and scheme in ("http", "https"):
        if problem := _url_problem(text):
            raise UsageError(f"{name} is {_short(text)}; {problem}.")
        return f"{scheme}:{rest}"
    hint = f"write {name}=@{text} to send that file" if text and len(text) < 200 else f"write {name}=@FILE"
    raise UsageError(f"{name} is {_short(text)}, which is neither an http(s) URL nor a data URI: {hint}.")


def _checked_data(name: str, rest: str) -> str:
    """Checks that a data URI can be decoded and is not too large. `rest`: the text after `data:`."""
    head, comma, data = rest.partition(",")
    if not comma:
        raise UsageError(f"{name} is a data URI without a comma: write data:audio/wav;base64,...")
    coded = head.lower().endswith(";base64")
    try:
        size = len(base64.b64decode(data, validate=True) if coded else unquote_to_bytes(data))
    except (binascii.Error, ValueError):
        raise UsageError(
            f"{name} is a data URI whose base64 does not decode: write {name}=@FILE instead."
        ) from None
    _check_size(name, "the data URI", size)
    return f"{head[: -len('base64')]}base64,{data}" if coded else rest


def _url_problem(url: str) -> str | None:
    """Says why a URL cannot be used. None: it can."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return "its host or port cannot be read"
    if not parts.hostname:
        return "it names no host"
    return "it holds spaces" if re.search(r"\s", url) else None


def _text(name: str, path: Path) -> str:
    """Reads a text file, without the line break at its end."""
    try:
        return _content(name, path).decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise UsageError(f"{name}: {path} is not a UTF-8 text file; save it as UTF-8.") from None


def _data_uri(name: str, path: Path) -> str:
    """Reads a file into a data URI."""
    mime = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{mime};base64,{base64.b64encode(_content(name, path)).decode()}"


def _content(name: str, path: Path) -> bytes:
    """Reads a file or a pipe, but not more than a server would accept."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        hint = f"; to send text that begins with @, write {name}='\"@...\"'" if name == "prompt" else ""
        raise UsageError(f"{name}: cannot read {_shown(path)}: {error.strerror}{hint}.") from None
    _check_size(name, _shown(path), max(size, len(data)))
    return data


def _check_size(name: str, what: str, size: int) -> None:
    """Checks that a file has a size in bytes that a server accepts."""
    if size == 0:
        raise UsageError(f"{name}: {what} is empty (0 bytes); give one with content.")
    if size > MAX_FILE_BYTES:
        raise UsageError(
            f"{name}: {what} has {size / 1e6:.1f} MB or more; Cog takes {MAX_FILE_BYTES / 1e6:.1f} MB in a "
            "request: convert it to mp3 or flac, or give an http(s) URL."
        )


def _shown(path: Path) -> str:
    """A path as text that can be printed, whatever bytes it has."""
    return str(path).encode(errors="surrogateescape").decode(errors="replace")


def _short(text: str) -> str:
    """A value in quotes, cut to 80 characters."""
    shown = repr(text)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
