"""`-i name=value` from the command line -> the JSON that Cog's server takes, or a sentence that says why."""

import base64
import binascii
import mimetypes
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

from musicgen_svc.cli.schema_fields import expectation, fields, fits, is_file, parsed

Json = dict[str, Any]

MAX_FILE_BYTES = 75 * 2**20
"""Cog's server takes a body of 100 MiB, and a file is a third longer there."""


class UsageError(Exception):
    """The command line cannot be acted on: one sentence for the user."""


def request_input(pairs: list[str], schema: Json | None) -> Json:
    """The request's `input`. Without a schema everything is a string, and every `@file` a file.

    Raises:
        UsageError: a pair that is none, a name that is unknown or given twice, a value that the schema does
            not allow, an unreadable file.
    """
    known = fields(schema)
    values: Json = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise UsageError(f"-i {_short(pair)}: an input is written name=value.")
        if name in values:
            raise UsageError(f"-i {name}=...: {name} is given twice.")
        if known is not None and name not in known:  # Cog would drop it without a word
            raise UsageError(f"There is no input {name!r}; there are {', '.join(known)}.")
        values[name] = _value(
            name, text, known[name] if known else {"format": "uri"}, strict=known is not None
        )
    required = (schema or {}).get("components", {}).get("schemas", {}).get("Input", {}).get("required", [])
    if missing := [name for name in required if name not in values]:
        raise UsageError(f"The input {missing[0]} is missing: give it as -i {missing[0]}=VALUE.")
    return values


def checked_url(url: str) -> str:
    """
    Raises:
        UsageError: it is not the http(s) URL of a server.
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
    """With `~` as a shell reads it; where nobody is called so, it is a name like any other."""
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def _value(name: str, text: str, field: Json, strict: bool) -> Any:
    """One input's JSON value. `strict`: what is not @FILE must be what the field accepts."""
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
    """A URL or a data URI, its scheme in lower case: Cog knows no other.

    Raises:
        UsageError: it is neither.
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
    """What follows `data:` in a data URI, if it decodes to something that a server takes."""
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
    """Why a URL with a scheme leads nowhere."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return "its host or port cannot be read"
    if not parts.hostname:
        return "it names no host"
    return "it holds spaces" if re.search(r"\s", url) else None


def _text(name: str, path: Path) -> str:
    """The text of a file, without the end of its last line."""
    try:
        return _content(name, path).decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise UsageError(f"{name}: {path} is not a UTF-8 text file; save it as UTF-8.") from None


def _data_uri(name: str, path: Path) -> str:
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(_content(name, path)).decode()}"


def _content(name: str, path: Path) -> bytes:
    """What a file or a pipe holds; no more is read than a server would take."""
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
    if size == 0:
        raise UsageError(f"{name}: {what} is empty (0 bytes); give one with content.")
    if size > MAX_FILE_BYTES:
        raise UsageError(
            f"{name}: {what} has {size / 1e6:.1f} MB or more; Cog takes {MAX_FILE_BYTES / 1e6:.1f} MB in a "
            "request: convert it to mp3 or flac, or give an http(s) URL."
        )


def _shown(path: Path) -> str:
    """A path that can be printed, whatever bytes it is made of."""
    return str(path).encode(errors="surrogateescape").decode(errors="replace")


def _short(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
