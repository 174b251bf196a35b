"""Says in one sentence why a file of weights cannot be read, from its length and its first bytes.

Every reader of such a file raises `damaged_error` when its library refuses the file. The library's own words
are not repeated.
"""

import json
import struct
from pathlib import Path
from typing import NamedTuple

from musicgen_svc.errors import DamagedFileError

_AGAIN = "download or copy it again"
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_LFS_POINTER_BYTES = 1024
"""The specification of Git LFS makes every pointer shorter than this."""
_WEB_PAGES = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<error")
_HEAD_BYTES = 512
_HEADER_LENGTH_BYTES = 8  # at the start of a safetensors file: its header's length, little-endian
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


class Fault(NamedTuple):
    """What is wrong with a file: the end of a sentence that begins with the file's path."""

    description: str
    remedy: str


def damaged_error(path: Path, expected: str, position: str = "") -> DamagedFileError:
    """The error for a file that its library could not read.

    Args:
        expected: what the file should be, as the sentence says it: `a PyTorch checkpoint`.
        position: where in the file reading stopped, if that helps its author: ` (line 3, column 7)`.
    """
    what = f"cannot be read as {expected}{position}, as it is damaged or truncated, or another kind of file"
    return _error(path, obvious_fault(path) or Fault(what, _AGAIN))


def check_not_damaged(path: Path) -> None:
    """Refuses a file that no reader can read, whatever it should be.

    Raises:
        DamagedFileError: it is missing, empty, a folder, a Git LFS pointer, a web page or truncated.
    """
    if fault := obvious_fault(path):
        raise _error(path, fault)


def name_exists(path: Path) -> bool:
    """Whether the folder has an entry of this name. A link to a missing file counts: it is a damaged file."""
    return path.exists() or path.is_symlink()


def obvious_fault(path: Path) -> Fault | None:
    """What is wrong with the file, if its length and its first bytes tell."""
    if path.is_dir():
        return Fault("is a folder, and must be a file", "put the file in its place")
    if not path.is_file():
        return Fault("is missing", _AGAIN)
    try:
        return _content_fault(path)
    except OSError as exc:
        return unreadable_fault(exc)


def unreadable_fault(cause: OSError) -> Fault:
    """What is wrong with a file or folder that the operating system does not let us read."""
    return Fault(f"cannot be read ({cause.strerror or cause})", "check its permissions and its disk")


def looks_like_safetensors(path: Path) -> bool:
    """Whether the file begins as every safetensors file does: the length of a header, then the header."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEADER_LENGTH_BYTES + 1)
    except OSError:
        return False
    if len(head) <= _HEADER_LENGTH_BYTES or head[-1:] != b"{":
        return False
    return 2 <= int(struct.unpack("<Q", head[:-1])[0]) <= _MAX_HEADER_BYTES


def _content_fault(path: Path) -> Fault | None:
    size = path.stat().st_size
    if size == 0:
        return Fault("is empty (0 bytes)", _AGAIN)
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if head.startswith(_LFS_POINTER) and size < _LFS_POINTER_BYTES:
        return Fault(
            "is a Git LFS pointer and not the file that it stands for", "run git lfs pull in its clone"
        )
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(_WEB_PAGES):
        return Fault("is a web page, such as a server sends in place of a file", "download it again")
    return _truncation(path, size) if looks_like_safetensors(path) else None


def _truncation(path: Path, size: int) -> Fault | None:
    """The fault of a safetensors file that ends before its header does, or before its last tensor does."""
    with path.open("rb") as file:
        length = int(struct.unpack("<Q", file.read(_HEADER_LENGTH_BYTES))[0])
        header = file.read(length)
    needed = _HEADER_LENGTH_BYTES + length
    if len(header) == length:
        try:
            entries = json.loads(header)
            needed += max(e["data_offsets"][1] for name, e in entries.items() if name != "__metadata__")
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return None  # damaged in another way
    if size >= needed:
        return None
    return Fault(f"is truncated, with {size:,} of at least {needed:,} bytes", _AGAIN)


def _error(path: Path, fault: Fault) -> DamagedFileError:
    """The error for the log, and for clients the same without the folders above the file's own."""
    sentence = f"{fault.description}: {fault.remedy}."
    return DamagedFileError(f"{path} {sentence}", for_client=f"{path.parent.name}/{path.name} {sentence}")
