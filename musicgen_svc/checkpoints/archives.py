"""Unpacks the tar or zip around a checkpoint into a folder, or refuses it before anything is written."""

import bz2
import gzip
import lzma
import os
import shutil
import stat
import tarfile
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from musicgen_svc.checkpoints.damage import damaged_error
from musicgen_svc.checkpoints.unpickle import ZIP_MAGIC, is_torch_file
from musicgen_svc.errors import DISK_FULL, WeightsError

MAX_UNPACKED_BYTES = 64 << 30
"""This is several times the size of the largest model in fp32."""
_MAX_ENTRIES = 10_000
UNFINISHED_PREFIX = ".unpacking-"
"""The prefix of a folder's name while it is written."""
_PIECE_BYTES = 1 << 20
"""Files are copied in pieces of this size, and no header of a tar may be longer."""
_TAR_BLOCK_BYTES = 512
_MAX_PADDING_BYTES = 16 << 20
_COMPRESSIONS: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.GzipFile,
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
}
_READ_ERRORS = (
    OSError, EOFError, ValueError, RuntimeError, tarfile.TarError, zipfile.BadZipFile, zlib.error,
    lzma.LZMAError,
)  # fmt: skip
"""All that the libraries for archives raise for one that they cannot read."""


@dataclass(frozen=True)
class _Entry:
    """One entry of an archive, whichever kind of archive it is."""

    name: str
    size: int
    """Bytes after unpacking."""
    is_folder: bool
    is_file: bool
    """False for links and devices."""
    member: Any
    """The entry as the archive's library represents it."""


def is_archive(path: Path) -> bool:
    """Whether the file is a tar, compressed or not, or a zip that torch.save did not write."""
    try:
        return not is_torch_file(path) and (_starts_like_zip(path) or _is_tar(path))
    except OSError:
        return False


def unpack(path: Path, folder: Path, limit_bytes: int = MAX_UNPACKED_BYTES) -> None:
    """Creates `folder` with all of the archive's files; creates nothing if that fails.

    Raises:
        WeightsError: a path in it leads out of the folder, an entry is a link or a device, it unpacks to more
            than `limit_bytes` or than the disk has left, or it cannot be read.
    """
    total = 0
    try:
        with _open_archive(path) as (entries, _):
            total = _check(path, entries, limit_bytes)
        free = shutil.disk_usage(folder.parent).free
        if total > free:
            raise WeightsError(
                f"{path} unpacks to {total:,} bytes, and {folder.parent} has {free:,} left: make room there."
            )
        _write_all(path, folder)
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as exc:
        raise WeightsError(f"{path} cannot be unpacked: it holds two entries of one name.") from exc
    except _READ_ERRORS as exc:
        raise _unpack_error(path, folder.parent, total, exc) from exc


def _unpack_error(path: Path, cache: Path, total: int, exc: Exception) -> WeightsError:
    """The error for an archive that a library or the operating system failed to unpack."""
    number = exc.errno if isinstance(exc, OSError) else None
    if number in DISK_FULL:
        return WeightsError(
            f"{path} unpacks to {total:,} bytes, and the disk of {cache} is full: make room there."
        )
    if number is None:  # the error is not the operating system's: it concerns the archive's content
        return damaged_error(path, "an archive")
    return WeightsError(f"{path} cannot be unpacked in {cache} ({os.strerror(number)}): check that folder.")


def _write_all(path: Path, folder: Path) -> None:
    """Writes all entries into a temporary folder, and then renames it to `folder`."""
    # Not by tempfile, whose folders only their owner may read.
    temporary = folder.parent / f"{UNFINISHED_PREFIX}{uuid.uuid4().hex}"
    temporary.mkdir()
    try:
        with _open_archive(path) as (entries, open_entry):
            for entry in entries:
                _write(entry, open_entry, temporary)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check(path: Path, entries: Iterable[_Entry], limit_bytes: int) -> int:
    """Checks the entries' names, types and sizes, and returns the bytes that the archive unpacks to.

    Raises:
        WeightsError: an entry is refused, or there are too many entries or bytes.
    """
    total = 0
    for count, entry in enumerate(entries, 1):
        parts = PurePosixPath(entry.name).parts
        if count > _MAX_ENTRIES:
            raise WeightsError(f"{path} holds more than {_MAX_ENTRIES} files.")
        if entry.name.startswith("/") or ".." in parts or "\\" in entry.name or "\0" in entry.name:
            raise WeightsError(f"{path} holds {entry.name!r:.80}, which is a path out of its folder.")
        if not (entry.is_file or entry.is_folder):
            raise WeightsError(f"{path} holds {entry.name!r:.80}, which is a link or a device.")
        total += entry.size
        if entry.size < 0 or total > limit_bytes:
            raise WeightsError(f"{path} unpacks to more than {limit_bytes} bytes, which is the limit.")
    return total


def _write(entry: _Entry, open_entry: Any, folder: Path) -> None:
    """Writes one entry below `folder`, except for the files that macOS adds to archives."""
    relative = PurePosixPath(entry.name)
    if "__MACOSX" in relative.parts or relative.name.startswith("._"):
        return
    target = folder / relative
    if entry.is_folder:
        target.mkdir(parents=True, exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with open_entry(entry.member) as source, target.open("xb") as out:
        shutil.copyfileobj(source, out, _PIECE_BYTES)


@contextmanager
def _open_archive(path: Path) -> Iterator[tuple[Iterator[_Entry], Any]]:
    """Opens the archive: gives its entries, and a function that opens one of them for reading."""
    with ExitStack() as stack:
        if _starts_like_zip(path):
            archive = stack.enter_context(zipfile.ZipFile(path))
            yield _zip_entries(archive, path), archive.open
        else:
            file = stack.enter_context(_decompressed(path))
            reader = _ShortReads(file)
            tar = stack.enter_context(tarfile.open(fileobj=reader, mode="r:"))  # type: ignore[call-overload]
            yield _tar_entries(tar), tar.extractfile
            # tarfile also stops where the file stops, and then files may be missing.
            if reader.last_block != bytes(_TAR_BLOCK_BYTES):
                raise tarfile.ReadError("it does not end in zeros, as every tar does")
            _read_padding(file)


def _zip_entries(archive: zipfile.ZipFile, path: Path) -> Iterator[_Entry]:
    for info in archive.infolist():
        if info.flag_bits & 1:
            raise WeightsError(f"{path} is encrypted.")
        file_type = stat.S_IFMT(info.external_attr >> 16)  # 0 from systems that store no file type
        is_folder = info.is_dir() and file_type in (0, stat.S_IFDIR)
        is_file = not info.is_dir() and file_type in (0, stat.S_IFREG)
        yield _Entry(info.filename, info.file_size, is_folder, is_file, info)


def _tar_entries(archive: tarfile.TarFile) -> Iterator[_Entry]:
    for info in archive:
        is_file = info.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not info.issparse()
        yield _Entry(info.name, info.size, info.isdir(), is_file, info)


def _read_padding(file: IO[bytes]) -> None:
    """Reads the padding after a tar's end: a compressed file's checksum is compared only at its own end."""
    for _ in range(_MAX_PADDING_BYTES // _PIECE_BYTES):
        if not file.read(_PIECE_BYTES):
            return
    raise tarfile.ReadError("it goes on after its end")


class _ShortReads:
    """A file that refuses long reads: a tar's header may claim any length, and tarfile reads it in one go."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell
        self.last_block = b""
        """The result of the last read."""

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _PIECE_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        self.last_block = self._file.read(size)
        return self.last_block


def _starts_like_zip(path: Path) -> bool:
    """Whether the file is a zip and begins like one; `is_zipfile` alone accepts a tar that ends in a zip."""
    with path.open("rb") as file:
        return file.read(len(ZIP_MAGIC)) == ZIP_MAGIC and zipfile.is_zipfile(path)


def _is_tar(path: Path) -> bool:
    """Whether the file, decompressed if need be, begins with a tar's header."""
    try:
        with _decompressed(path) as file:
            tarfile.TarInfo.frombuf(file.read(_TAR_BLOCK_BYTES), "utf-8", "surrogateescape")
    except _READ_ERRORS:
        return False
    return True


def _decompressed(path: Path) -> IO[bytes]:
    """Opens a file for reading, through a decompressor if its first bytes name one."""
    with path.open("rb") as file:
        head = file.read(8)
    for magic, opener in _COMPRESSIONS.items():
        if head.startswith(magic):
            opened: IO[bytes] = opener(path, "rb")
            return opened
    return path.open("rb")
