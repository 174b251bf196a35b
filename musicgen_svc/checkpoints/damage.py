"""Why a file of weights cannot be read, in one sentence: told by its length and its first bytes.

Every reader of such a file calls `damaged` when its library refuses the file, and repeats no words of it.
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
_PAGES = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<error")
_HEAD_BYTES = 512
_HEADER_LENGTH_BYTES = 8  # of a safetensors file: how long its header is, little-endian
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


class Fault(NamedTuple):
    """What is wrong with a file: the rest of a sentence about it."""

    what: str
    remedy: str


def damaged(path: Path, kind: str, place: str = "") -> DamagedFileError:
    """The error of a file that could not be read.

    Args:
        kind: what it should be, as the sentence says it: `a PyTorch checkpoint`.
        place: where in the file reading stopped, if that helps its author: ` (line 3, column 7)`.
    """
    what = f"cannot be read as {kind}{place}, as it is damaged or truncated, or another kind of file"
    return _error(path, obvious_fault(path) or Fault(what, _AGAIN))


def check_not_damaged(path: Path) -> None:
    """
    Raises:
        DamagedFileError: the file is one that no reader can read, whatever it should be.
    """
    if fault := obvious_fault(path):
        raise _error(path, fault)


def is_there(path: Path) -> bool:
    """Whether something has the name, and be it a link to nowhere: then it is damaged, and not absent."""
    return path.exists() or path.is_symlink()


def obvious_fault(path: Path) -> Fault | None:
    """What is wrong with the file, if its length and its first bytes tell."""
    if path.is_dir():
        return Fault("is a folder, and must be a file", "put the file in its place")
    if not path.is_file():
        return Fault("is missing", _AGAIN)
    try:
        return _fault_of_content(path)
    except OSError as exc:
        return Fault(f"cannot be read ({exc.strerror})", "check its permissions and its disk")


def _fault_of_content(path: Path) -> Fault | None:
    size = path.stat().st_size
    if size == 0:
        return Fault("is empty (0 bytes)", _AGAIN)
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if head.startswith(_LFS_POINTER) and size < _LFS_POINTER_BYTES:
        return Fault(
            "is a Git LFS pointer and not the file that it stands for", "run git lfs pull in its clone"
        )
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(_PAGES):
        return Fault("is a web page, such as a server sends in place of a file", "download it again")
    return _shortage(path, size) if looks_like_safetensors(path) else None


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


def _shortage(path: Path, size: int) -> Fault | None:
    """Whether a safetensors file ends before its header, or before the last of the tensors that are in it."""
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
    sentence = f"{fault.what}: {fault.remedy}."
    return DamagedFileError(f"{path} {sentence}", for_client=f"{path.parent.name}/{path.name} {sentence}")
