"""The output of a prediction: fetches it from Cog's reply, and writes it to a file or to standard output."""

import base64
import binascii
import contextlib
import mimetypes
import os
import sys
import uuid
from pathlib import Path
from urllib.parse import unquote_to_bytes

import requests

from musicgen_svc.cli.client import FailedError
from musicgen_svc.cli.inputs import UsageError, expanded

SUFFIXES = {"audio/wav": ".wav", "audio/x-wav": ".wav", "audio/mpeg": ".mp3"}
STDOUT = Path("/dev/stdout")
STDOUT_NAMES = ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")


def checked_output(name: str | Path | None) -> Path | None:
    """Checks, before the long work, that the output can be written.

    Args:
        name: of the file. None: a free name in the current folder, chosen later.

    Returns:
        Path: the file to write, or STDOUT for standard output.

    Raises:
        UsageError: the output cannot be written.
    """
    if name is None:
        if not os.access(Path(), os.W_OK):
            raise UsageError(f"{Path().absolute()} cannot be written to: name a file elsewhere with -o.")
        return None
    if str(name) in STDOUT_NAMES:
        if sys.stdout is None or sys.stdout.isatty():
            raise UsageError(f"-o {name}: standard output is no file or pipe: add `> FILE` or `| PROGRAM`.")
        return STDOUT
    path = expanded(Path(name))
    if path.is_dir():
        raise UsageError(f"-o {path}: that is a folder; name a file in it.")
    parent = path.resolve().parent
    if not parent.is_dir():
        raise UsageError(f"-o {path}: there is no folder {parent}; make it, or name a file elsewhere.")
    if not os.access(path if _is_device(path) else parent, os.W_OK):
        raise UsageError(f"-o {path}: {parent} cannot be written to; name a file elsewhere.")
    return path


def _is_device(path: Path) -> bool:
    """Whether a path is a device or a pipe, such as /dev/null, which is written to and never replaced."""
    return path.exists() and not path.is_file()


def fetch(output: str) -> tuple[bytes, str]:
    """Fetches an output. `output`: a data URI, or the URL to which Cog uploaded it.

    Returns:
        tuple: the bytes, and the suffix of a file that holds them.

    Raises:
        FailedError: the output is damaged or cannot be fetched.
    """
    if output.startswith("data:"):
        head, _, data = output[len("data:") :].partition(",")
        kind, *options = head.split(";")
        try:
            body = base64.b64decode(data, validate=True) if "base64" in options else unquote_to_bytes(data)
        except binascii.Error:
            raise FailedError("The server's output is damaged: its base64 does not decode.") from None
    else:
        try:
            response = requests.get(output, timeout=(10, 60))
            response.raise_for_status()
        except requests.RequestException as error:
            raise FailedError(f"The output at {output} cannot be fetched: {error}") from None
        body, kind = response.content, response.headers.get("content-type", "").partition(";")[0]
    suffix = SUFFIXES.get(kind) or mimetypes.guess_extension(kind)
    return body, suffix or Path(output[:1000].partition("?")[0]).suffix or ".bin"


def save(body: bytes, suffix: str, wanted: Path | None) -> Path:
    """Writes the output completely or not at all. Replaces no file but the wanted one or its link's target.

    Args:
        body: the bytes.
        suffix: for a file whose name is chosen here.
        wanted: as `checked_output` returned it.

    Returns:
        Path: where the output is.

    Raises:
        FailedError: it cannot be written.
    """
    if wanted == STDOUT:
        return _write_to_stdout(body)
    target = wanted.resolve() if wanted else None
    temporary = (target.parent if target else Path()) / f".output-{uuid.uuid4().hex}"
    try:
        if wanted and _is_device(wanted):
            wanted.write_bytes(body)
            return wanted
        temporary.write_bytes(body)
        target = target or _free_name(suffix)
        temporary.replace(target)
    except OSError as error:
        raise FailedError(f"The output cannot be written to {error.filename}: {error.strerror}.") from None
    finally:
        temporary.unlink(missing_ok=True)
    return wanted or target


def _write_to_stdout(body: bytes) -> Path:
    """Writes the output to standard output."""
    try:
        sys.stdout.buffer.write(body)
        sys.stdout.buffer.flush()
    except OSError as error:
        raise FailedError(f"The output cannot be written to standard output: {error.strerror}.") from None
    return STDOUT


def _free_name(suffix: str) -> Path:
    """Creates the first of output.wav, output-1.wav, ... that does not exist, and returns its path."""
    number = 0
    while True:
        path = Path(f"output-{number}{suffix}" if number else f"output{suffix}")
        with contextlib.suppress(FileExistsError):
            path.open("xb").close()
            return path
        number += 1
