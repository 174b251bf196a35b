"""The lock file of the weights folder: what was downloaded into it. Needs no torch."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from musicgen_svc.checkpoints.damage import obvious_fault
from musicgen_svc.errors import WeightsError

LOCK_FILE = "weights.lock.json"


@dataclass(frozen=True)
class LockedFile:
    """The size and hash of a file after its download, when the hash had been verified."""

    size: int
    """In bytes."""
    sha256: str


@dataclass(frozen=True)
class LockedSource:
    """A folder of weights: the repository that it came from, and its files."""

    repository: str
    revision: str
    """The commit in the repository."""
    files: dict[str, LockedFile]


def read_lock(weights_dir: Path) -> dict[str, LockedSource]:
    """Every source that was downloaded completely, by name; empty if there is no lock file.

    Raises:
        WeightsError: the lock file is damaged.
    """
    path = weights_dir / LOCK_FILE
    if not path.exists():
        return {}
    try:
        entries = json.loads(path.read_text())
        return {
            name: LockedSource(
                repository=str(entry["repository"]),
                revision=str(entry["revision"]),
                files={
                    file: LockedFile(int(locked["size"]), str(locked["sha256"]))
                    for file, locked in entry["files"].items()
                },
            )
            for name, entry in entries.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        fault = obvious_fault(path)
        raise WeightsError(
            f"{path} {fault.description if fault else 'is damaged or truncated'}: delete it and run "
            "scripts/download_weights again."
        ) from exc


def write_lock(weights_dir: Path, lock: dict[str, LockedSource]) -> None:
    """Replaces the lock file in one step, so that a reader sees either the old one or the new one."""
    temporary = weights_dir / f"{LOCK_FILE}.new"
    entries = {name: asdict(lock[name]) for name in sorted(lock)}
    temporary.write_text(json.dumps(entries, indent=2) + "\n")
    temporary.replace(weights_dir / LOCK_FILE)


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size_fault(path: Path, expected: LockedFile) -> str | None:
    """What is wrong with a file's size: the start of a sentence, or None. Does not read it all."""
    if not path.is_file():
        return f"{path} is a folder, and must be a file" if path.is_dir() else f"{path} is missing"
    size = path.stat().st_size
    if size != expected.size and (fault := obvious_fault(path)):
        return f"{path} {fault.description}"
    if size != expected.size:
        return f"{path} has {size:,} bytes instead of {expected.size:,}"
    return None


def content_fault(path: Path, expected: LockedFile) -> str | None:
    """What is wrong with a file: the start of a sentence, or None. Reads the whole file."""
    fault = size_fault(path, expected)
    if fault is None and sha256_of(path) != expected.sha256:
        return f"{path} has another sha256 than {LOCK_FILE} says"
    return fault


def check_sizes(weights_dir: Path) -> None:
    """Compares the sizes of the files in `weights_dir` with its lock file. Fast: it runs at each start.

    Folders that were removed or never downloaded are not checked.

    Raises:
        WeightsError: a file is missing or has another size; the message names the first one.
    """
    for name, source in read_lock(weights_dir).items():
        folder = weights_dir / name
        if not folder.is_dir():
            continue
        for file, expected in source.files.items():
            wrong = size_fault(folder / file, expected)
            if wrong is not None:
                raise WeightsError(
                    f"{wrong}: run scripts/download_weights {name} to fetch it again, or delete "
                    f"{weights_dir / LOCK_FILE} if you meant to change it."
                )
