"""A tar or zip around a checkpoint -> a folder of its files, or a refusal before anything is written."""

import bz2
import errno
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

from musicgen_svc.checkpoints.damage import damaged
from musicgen_svc.checkpoints.unpickle import ZIP_MAGIC, is_torch_file
from musicgen_svc.errors import WeightsError

MAX_UNPACKED_BYTES = 64 << 30
"""Several times the largest model in fp32."""
_MAX_ENTRIES = 10_000
UNFINISHED = ".unpacking-"
"""What the name of a folder begins with while it is written."""
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_PIECE_BYTES = 1 << 20
"""Files are copied in such pieces, and no header is longer."""
_BLOCK = 512  # of a tar
_MAX_PADDING_BYTES = 16 << 20
_COMPRESSIONS: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.GzipFile,
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
}
UNREADABLE = (
    OSError, EOFError, ValueError, RuntimeError, tarfile.TarError, zipfile.BadZipFile, zlib.error,
    lzma.LZMAError,
)  # fmt: skip


@dataclass(frozen=True)
class _Entry:
    name: str
    size: int
    is_folder: bool
    is_file: bool
    """False for links and devices."""
    member: Any
    """What the archive's own library calls it."""


def is_archive(path: Path) -> bool:
    """Whether the file is a tar, compressed or not, or a zip that torch.save did not write."""
    try:
        return not is_torch_file(path) and (_starts_like_zip(path) or _is_tar(path))
    except OSError:
        return False


def unpack(path: Path, folder: Path, limit_bytes: int = MAX_UNPACKED_BYTES) -> None:
    """Makes `folder` with all the archive's files, or nothing.

    Raises:
        WeightsError: a path in it leaves the folder, an entry is a link or a device, it unpacks to more than
            `limit_bytes` or than the disk has, or it cannot be read.
    """
    total = 0
    try:
        with _opened(path) as (entries, _):
            total = _check(path, entries, limit_bytes)
        free = shutil.disk_usage(folder.parent).free
        if total > free:
            raise WeightsError(
                f"{path} unpacks to {total:,} bytes, and {folder.parent} has {free:,} left: make room there."
            )
        _write_all(path, folder)
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as exc:
        raise WeightsError(f"{path} cannot be unpacked: it holds two entries of one name.") from exc
    except UNREADABLE as exc:
        raise _failure(path, folder.parent, total, exc) from exc


def _failure(path: Path, cache: Path, total: int, exc: Exception) -> WeightsError:
    number = (
        exc.errno if isinstance(exc, OSError) else None
    )  # without one it is a complaint about the content
    if number in DISK_FULL:
        return WeightsError(
            f"{path} unpacks to {total:,} bytes, and the disk of {cache} is full: make room there."
        )
    if number is None:
        return damaged(path, "an archive")
    return WeightsError(f"{path} cannot be unpacked in {cache} ({os.strerror(number)}): check that folder.")


def _write_all(path: Path, folder: Path) -> None:
    temporary = folder.parent / f"{UNFINISHED}{uuid.uuid4().hex}"  # tempfile's are the owner's alone
    temporary.mkdir()
    try:
        with _opened(path) as (entries, read):
            for entry in entries:
                _write(entry, read, temporary)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check(path: Path, entries: Iterable[_Entry], limit_bytes: int) -> int:
    """The bytes that the archive unpacks to, by its names and sizes alone, up to the first fault."""
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


def _write(entry: _Entry, read: Any, folder: Path) -> None:
    inside = PurePosixPath(entry.name)
    if "__MACOSX" in inside.parts or inside.name.startswith("._"):
        return  # what a Mac adds
    target = folder / inside
    if entry.is_folder:
        target.mkdir(parents=True, exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with read(entry.member) as source, target.open("xb") as out:
        shutil.copyfileobj(source, out, _PIECE_BYTES)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Iterator[_Entry], Any]]:
    """The entries, and what opens one of them."""
    with ExitStack() as stack:
        if _starts_like_zip(path):
            archive = stack.enter_context(zipfile.ZipFile(path))
            yield _zip_entries(archive, path), archive.open
        else:
            file = stack.enter_context(_decompressed(path))
            blocks = _ShortReads(file)
            tar = stack.enter_context(tarfile.open(fileobj=blocks, mode="r:"))  # type: ignore[call-overload]
            yield _tar_entries(tar), tar.extractfile
            if blocks.last != bytes(_BLOCK):  # where tarfile sees an end, too, but others' files may be lost
                raise tarfile.ReadError("it does not end in zeros, as every tar does")
            _drain(file)


def _zip_entries(archive: zipfile.ZipFile, path: Path) -> Iterator[_Entry]:
    for info in archive.infolist():
        if info.flag_bits & 1:
            raise WeightsError(f"{path} is encrypted.")
        kind = stat.S_IFMT(info.external_attr >> 16)  # 0 from systems that have none
        folder = info.is_dir()
        is_file = not folder and kind in (0, stat.S_IFREG)
        yield _Entry(info.filename, info.file_size, folder and kind in (0, stat.S_IFDIR), is_file, info)


def _tar_entries(archive: tarfile.TarFile) -> Iterator[_Entry]:
    for info in archive:
        is_file = info.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not info.issparse()
        yield _Entry(info.name, info.size, info.isdir(), is_file, info)


def _drain(file: IO[bytes]) -> None:
    """Reads what pads a tar's end: only there a compressed file's checksum is compared."""
    for _ in range(_MAX_PADDING_BYTES // _PIECE_BYTES):
        if not file.read(_PIECE_BYTES):
            return
    raise tarfile.ReadError("it goes on after its end")


class _ShortReads:
    """A file that refuses long reads: a tar's header may claim any length, and is read at once."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell
        self.last = b""
        """What was read last."""

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _PIECE_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        self.last = self._file.read(size)
        return self.last


def _starts_like_zip(path: Path) -> bool:
    # zipfile.is_zipfile looks at the end, where a tar may have a zip as its last file.
    with path.open("rb") as file:
        return file.read(len(ZIP_MAGIC)) == ZIP_MAGIC and zipfile.is_zipfile(path)


def _is_tar(path: Path) -> bool:
    try:
        with _decompressed(path) as file:
            tarfile.TarInfo.frombuf(file.read(_BLOCK), "utf-8", "surrogateescape")
    except UNREADABLE:
        return False
    return True


def _decompressed(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        head = file.read(8)
    for magic, opener in _COMPRESSIONS.items():
        if head.startswith(magic):
            opened: IO[bytes] = opener(path, "rb")
            return opened
    return path.open("rb")
