"""What was downloaded into the weights folder, and whether it still lies there. No torch, no network."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from musicgen_svc.checkpoints.damage import obvious_fault
from musicgen_svc.errors import WeightsError

LOCK_FILE = "weights.lock.json"


@dataclass(frozen=True)
class LockedFile:
    """A file as it was when it had arrived and its hash was right."""

    size: int
    """In bytes."""
    sha256: str


@dataclass(frozen=True)
class LockedSource:
    """One folder of weights: where it came from and what it holds."""

    repository: str
    revision: str
    """The commit in the repository."""
    files: dict[str, LockedFile]


def read_lock(weights_dir: Path) -> dict[str, LockedSource]:
    """Every source that was downloaded completely, by name; nothing where there is no lock file.

    Raises:
        WeightsError: the file is not what `write_lock` wrote.
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
                    file: LockedFile(int(is_there["size"]), str(is_there["sha256"]))
                    for file, is_there in entry["files"].items()
                },
            )
            for name, entry in entries.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        found = obvious_fault(path)
        raise WeightsError(
            f"{path} {found.what if found else 'is damaged or truncated'}: delete it and run "
            "scripts/download_weights again."
        ) from exc


def write_lock(weights_dir: Path, lock: dict[str, LockedSource]) -> None:
    """Replaces the lock file in one step, so that a reader sees the old one or the new one."""
    draft = weights_dir / f"{LOCK_FILE}.new"
    entries = {name: asdict(lock[name]) for name in sorted(lock)}
    draft.write_text(json.dumps(entries, indent=2) + "\n")
    draft.replace(weights_dir / LOCK_FILE)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size_fault(path: Path, expected: LockedFile) -> str | None:
    """What is wrong with a file, without reading it: the start of a sentence, or nothing."""
    if not path.is_file():
        return f"{path} is a folder, and must be a file" if path.is_dir() else f"{path} is missing"
    size = path.stat().st_size
    if size != expected.size and (found := obvious_fault(path)):
        return f"{path} {found.what}"
    if size != expected.size:
        return f"{path} has {size:,} bytes instead of {expected.size:,}"
    return None


def fault(path: Path, expected: LockedFile) -> str | None:
    """What is wrong with a file, which is read from start to end."""
    found = size_fault(path, expected)
    if found is None and sha256_of(path) != expected.sha256:
        return f"{path} has another sha256 than {LOCK_FILE} says"
    return found


def check_sizes(weights_dir: Path) -> None:
    """Compares what lies in `weights_dir` with its lock file. Only asks for sizes: at once, at any start.

    Folders that were removed, and folders that were never downloaded, are none of its business.

    Raises:
        WeightsError: names the first file that is missing or of another size.
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
