"""Fills the weights folder from Hugging Face, lists what is in it, and verifies it.

A file grows in `weights/.partial/`, and a model moves to its place when all of it has arrived and every hash
is right: a stopped download goes on where it stopped, and half a model is never taken for one.
"""

import argparse
import fcntl
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import logging as hub_logging
from huggingface_hub.utils.tqdm import tqdm

from musicgen_svc.cli.hub_files import AGAIN, Remote, explained, fetch, files_of
from musicgen_svc.errors import ServiceError, WeightsError
from musicgen_svc.settings import Settings
from musicgen_svc.weights.catalog import Catalog, Source, read_catalog
from musicgen_svc.weights.lock_file import (
    LOCK_FILE,
    LockedFile,
    LockedSource,
    content_fault,
    read_lock,
    size_fault,
    write_lock,
)

ROOT = Path(__file__).resolve().parents[2]
PARTIAL = ".partial"
WORKERS = 8


@dataclass(frozen=True)
class Job:
    """What is left to do for one source."""

    source: Source
    revision: str
    present: dict[str, LockedFile]
    """Files that are in their place already, and right."""
    missing: list[Remote]


def with_needs(catalog: Catalog, names: Iterable[str]) -> list[Source]:
    """The sources called `names` and all they need, each once."""
    sources: dict[str, Source] = {}
    for source in map(catalog.find, names):
        for each in (source, *map(catalog.find, source.needs)):
            sources[each.name] = each
    return list(sources.values())


def belongs(source: Source, name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in source.files)


def lacking(source: Source, names: Iterable[str]) -> list[str]:
    """The names and patterns of `source` that nothing in `names` is an instance of."""
    names = list(names)
    return [pattern for pattern in source.files if not any(fnmatchcase(name, pattern) for name in names)]


def size_faults(folder: Path, locked: LockedSource) -> list[str]:
    found = (size_fault(folder / name, file) for name, file in locked.files.items())
    return [sentence for sentence in found if sentence]


def partial_path(weights_dir: Path, source: Source, remote: Remote) -> Path:
    """Where a file grows. Its content is part of the name, so that two revisions never mix."""
    return weights_dir / PARTIAL / source.name / f"{remote.name}.{remote.content[:16]}"


def plan(source: Source, weights_dir: Path, locked: LockedSource | None, update: bool) -> Job | None:
    """Compares what is there with what should be. None: all is there, as far as sizes tell."""
    folder = weights_dir / source.name
    revision = None
    if locked and locked.repository == source.repository and not update:
        revision = locked.revision
        wrong = size_faults(folder, locked)
        if not wrong and not lacking(source, locked.files):
            return None
        for sentence in wrong:
            print(f"{sentence}: fetching it again")
    revision, published = files_of(source.repository, revision, source.name)
    remotes = [remote for remote in published if belongs(source, remote.name)]
    if absent := lacking(source, [remote.name for remote in remotes]):
        raise WeightsError(f"{source.repository} at {revision[:12]} has no {' and no '.join(absent)}.")
    found = {remote.name: _in_place(remote, folder / remote.name, locked) for remote in remotes}
    return Job(
        source,
        revision,
        {name: file for name, file in found.items() if file},
        [remote for remote in remotes if not found[remote.name]],
    )


def _in_place(remote: Remote, path: Path, locked: LockedSource | None) -> LockedFile | None:
    """What is recorded of a file that is there, or is read from it if nothing is."""
    file = locked.files.get(remote.name) if locked else None
    if file and file.sha256 == remote.sha256:
        return None if size_fault(path, file) else file
    return remote.recognise(path)


def check_disk(weights_dir: Path, jobs: list[Job]) -> None:
    """Raises WeightsError where what is still to come does not fit."""
    needed = 0
    for job in jobs:
        for remote in job.missing:
            partial = partial_path(weights_dir, job.source, remote)
            needed += remote.size - (partial.stat().st_size if partial.exists() else 0)
    free = shutil.disk_usage(weights_dir).free
    if needed > free:
        raise WeightsError(
            f"{_bytes(needed)} are to come and {weights_dir} has {_bytes(free)} free: make room, or name "
            "another folder with --weights-dir."
        )


def drop_stale(weights_dir: Path, jobs: list[Job]) -> None:
    """Removes partial files of other revisions, which nothing would ever complete."""
    for job in jobs:
        wanted = {partial_path(weights_dir, job.source, remote) for remote in job.missing}
        folder = weights_dir / PARTIAL / job.source.name
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.is_file() and path not in wanted:
                path.unlink()


def install(weights_dir: Path, job: Job, arrived: dict[str, LockedFile]) -> None:
    """Moves a source that is complete to its place and enters it in the lock file."""
    folder = weights_dir / job.source.name
    files = job.present | arrived
    with explained(job.source.name):
        folder.mkdir(parents=True, exist_ok=True)
        for remote in job.missing:
            shutil.move(partial_path(weights_dir, job.source, remote), folder / remote.name)
        lock = read_lock(weights_dir)
        lock[job.source.name] = LockedSource(
            job.source.repository, job.revision, {name: files[name] for name in sorted(files)}
        )
        write_lock(weights_dir, lock)
        shutil.rmtree(weights_dir / PARTIAL / job.source.name, ignore_errors=True)
    tqdm.write(f"{job.source.name}: complete, {job.source.repository} at {job.revision[:12]}")


@contextmanager
def alone(weights_dir: Path) -> Iterator[None]:
    """Keeps a second download out of the same folder, until this process ends in whatever way."""
    with explained(str(weights_dir)):
        weights_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(weights_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise WeightsError(f"Another download into {weights_dir} is running: wait for its end.") from exc
        yield
    finally:
        os.close(descriptor)


def download(sources: list[Source], weights_dir: Path, update: bool) -> None:
    """Fetches what is not there yet of `sources`, several files at a time."""
    lock = read_lock(weights_dir)
    jobs = []
    for source in sources:
        job = plan(source, weights_dir, lock.get(source.name), update)
        if job is None:
            print(f"{source.name}: complete")
        elif job.missing:
            jobs.append(job)
        else:
            install(weights_dir, job, {})
    drop_stale(weights_dir, jobs)
    check_disk(weights_dir, jobs)
    pool = ThreadPoolExecutor(WORKERS)
    try:
        running = {
            pool.submit(fetch, remote, partial_path(weights_dir, job.source, remote)): (job, remote)
            for job in jobs
            for remote in job.missing
        }
        arrived: dict[str, dict[str, LockedFile]] = {job.source.name: {} for job in jobs}
        for future in as_completed(running):
            job, remote = running[future]
            files = arrived[job.source.name]
            files[remote.name] = future.result()
            tqdm.write(f"{remote.label}: {_bytes(remote.size)}")
            if len(files) == len(job.missing):
                install(weights_dir, job, files)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


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
    """Prints a line for each model and component: what it takes on disk and what is missing."""
    lock = read_lock(weights_dir)
    sources = [*catalog.models.values(), *catalog.components.values()]
    states = {source.name: state(source, weights_dir, lock.get(source.name)) for source in sources}
    aliases = {name: f" ({alias})" for alias, name in catalog.aliases.items()}
    for source in sources:
        complete, words = states[source.name]
        needs = [need for need in source.needs if not states[need][0]]
        if complete and needs:
            words += f"; it needs {' and '.join(needs)}"
        taken = _taken(weights_dir / source.name)
        label = source.name + aliases.get(source.name, "")
        print(f"{label:26}{_bytes(taken) if taken else '-':>10}  {words}")


def state(source: Source, weights_dir: Path, locked: LockedSource | None) -> tuple[bool, str]:
    """Whether a source is complete as far as sizes tell, and that in words."""
    folder = weights_dir / source.name
    present = [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    if locked and present:
        wrong = size_faults(folder, locked)
        return not wrong, "; ".join(wrong) or f"complete, {locked.repository} at {locked.revision[:12]}"
    if present:
        absent = lacking(source, present)
        return not absent, f"lacks {', '.join(absent)}" if absent else f"present, not recorded in {LOCK_FILE}"
    if begun := _taken(weights_dir / PARTIAL / source.name):
        whole = f" of {_bytes(source.size_gb * 1e9)}" if source.size_gb else ""
        return False, f"missing, {_bytes(begun)}{whole} have arrived"
    return False, f"missing, {_bytes(source.size_gb * 1e9)} to download" if source.size_gb else "missing"


def _taken(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} bytes"


def chosen_folder() -> Path:
    """MUSICGEN_WEIGHTS_DIR as `scripts/serve` reads it: from where the user is, or from the checkout."""
    chosen = Settings.from_environment(os.environ).weights_dir
    return chosen if os.environ.get("MUSICGEN_WEIGHTS_DIR") and chosen.exists() else ROOT / chosen


def main(arguments: list[str] | None = None) -> int:
    catalog = read_catalog()
    names = ", ".join([*catalog.models, *catalog.components, *catalog.aliases])
    parser = argparse.ArgumentParser(prog="download_weights", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {names}")
    parser.add_argument("--weights-dir", type=Path, help="default: MUSICGEN_WEIGHTS_DIR, else weights/")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--list", action="store_true", help="say what is there and what is missing")
    mode.add_argument("--verify", action="store_true", help="read what is there and compare its hashes")
    mode.add_argument("--update", action="store_true", help=f"fetch the newest, not what {LOCK_FILE} names")
    args = parser.parse_args(arguments)
    if not (args.names or args.list or args.verify):
        parser.error(f"name what to download: {names}")
    if "HF_HUB_VERBOSITY" not in os.environ:
        hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # its retries need no words: errors are one sentence
    try:
        weights_dir = args.weights_dir or chosen_folder()
        if args.list:
            show(catalog, weights_dir)
        elif args.verify:
            verify(with_needs(catalog, args.names or read_lock(weights_dir)), weights_dir)
        else:
            sources = with_needs(catalog, args.names)
            with alone(weights_dir):
                download(sources, weights_dir, args.update)
    except ServiceError as exc:
        tqdm.write(str(exc), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        tqdm.write(f"Interrupted: {AGAIN}.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of other files may hang on a dead connection, and Python would wait for them.
    os._exit(code)
