"""The weights folder: which files are there, which are missing, and whether their hashes are right."""

import os
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from musicgen_svc.errors import WeightsError
from musicgen_svc.settings import Settings
from musicgen_svc.weights.catalog import Catalog, Source
from musicgen_svc.weights.lock_file import LOCK_FILE, LockedSource, content_fault, read_lock, size_fault

ROOT = Path(__file__).resolve().parents[2]
PARTIAL = ".partial"
"""Folder of files that have not arrived completely."""


def chosen_folder() -> Path:
    """The folder that MUSICGEN_WEIGHTS_DIR names, as `scripts/serve` reads it.

    A relative path starts at the current folder if it exists there, otherwise at the checkout.
    """
    chosen = Settings.from_environment(os.environ).weights_dir
    return chosen if os.environ.get("MUSICGEN_WEIGHTS_DIR") and chosen.exists() else ROOT / chosen


def belongs(source: Source, name: str) -> bool:
    """Whether a file of this name belongs to the source."""
    return any(fnmatchcase(name, pattern) for pattern in source.files)


def lacking(source: Source, names: Iterable[str]) -> list[str]:
    """The names and patterns of `source` that no entry of `names` matches."""
    names = list(names)
    return [pattern for pattern in source.files if not any(fnmatchcase(name, pattern) for name in names)]


def size_faults(folder: Path, locked: LockedSource) -> list[str]:
    """A sentence for each file that is missing or has another size than the lock file says."""
    found = (size_fault(folder / name, file) for name, file in locked.files.items())
    return [sentence for sentence in found if sentence]


def verify(sources: list[Source], weights_dir: Path) -> None:
    """Reads every file of `sources` and compares its hash.

    Raises:
        WeightsError: names the files that are wrong.
    """
    lock = read_lock(weights_dir)
    absent = [source.name for source in sources if source.name not in lock]
    if absent or not sources:
        raise WeightsError(
            f"{weights_dir / LOCK_FILE} has no hashes of {', '.join(absent) or 'anything'}: "
            f"run scripts/download_weights {' '.join(absent) or 'with the names of models'} first."
        )
    wrong: dict[str, list[str]] = {}
    for source in sources:
        for name, file in lock[source.name].files.items():
            sentence = content_fault(weights_dir / source.name / name, file)
            print(f"{source.name}/{name}: {'wrong' if sentence else 'good'}", flush=True)
            if sentence:
                wrong.setdefault(source.name, []).append(sentence)
    if wrong:
        sentences = " and ".join(sentence for each in wrong.values() for sentence in each)
        raise WeightsError(f"{sentences}: delete it and run scripts/download_weights {' '.join(wrong)}.")


def show(catalog: Catalog, weights_dir: Path) -> None:
    """Prints a line for each model and part: its size on disk and what is missing."""
    lock = read_lock(weights_dir)
    sources = [*catalog.models.values(), *catalog.parts.values()]
    states = {source.name: state(source, weights_dir, lock.get(source.name)) for source in sources}
    aliases = {name: f" ({alias})" for alias, name in catalog.aliases.items()}
    for source in sources:
        complete, words = states[source.name]
        needs = [need for need in source.needs if not states[need][0]]
        if complete and needs:
            words += f"; it needs {' and '.join(needs)}"
        taken = size_on_disk(weights_dir / source.name)
        label = source.name + aliases.get(source.name, "")
        print(f"{label:26}{in_bytes(taken) if taken else '-':>10}  {words}")


def state(source: Source, weights_dir: Path, locked: LockedSource | None) -> tuple[bool, str]:
    """Whether a source is complete, judged by the sizes of its files; and the same in words."""
    folder = weights_dir / source.name
    present = [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    if locked and present:
        wrong = size_faults(folder, locked)
        return not wrong, "; ".join(wrong) or f"complete, {locked.repository} at {locked.revision[:12]}"
    if present:
        absent = lacking(source, present)
        return not absent, f"lacks {', '.join(absent)}" if absent else f"present, not recorded in {LOCK_FILE}"
    if begun := size_on_disk(weights_dir / PARTIAL / source.name):
        whole = f" of {in_bytes(source.size_gb * 1e9)}" if source.size_gb else ""
        return False, f"missing, {in_bytes(begun)}{whole} have arrived"
    return False, f"missing, {in_bytes(source.size_gb * 1e9)} to download" if source.size_gb else "missing"


def size_on_disk(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def in_bytes(count: float) -> str:
    """A number of bytes with a unit, such as "1.50 GB"."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} bytes"
