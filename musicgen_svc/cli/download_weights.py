"""`scripts/download_weights`: fills the weights folder from Hugging Face, lists and verifies its content.

A file is written to `weights/.partial/` while it arrives. A model is moved into its own folder when all its
files have arrived with the right hashes. A download that was stopped therefore continues where it stopped,
and an incomplete model is never used.
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
from pathlib import Path

from huggingface_hub import logging as hub_logging
from huggingface_hub.utils.tqdm import tqdm

from musicgen_svc.cli.hub_files import AGAIN, Remote, explained, fetch, files_of
from musicgen_svc.cli.weights_folder import (
    PARTIAL,
    belongs,
    chosen_folder,
    in_bytes,
    lacking,
    show,
    size_faults,
    verify,
)
from musicgen_svc.errors import ServiceError, WeightsError
from musicgen_svc.weights.catalog import Catalog, Source, read_catalog
from musicgen_svc.weights.lock_file import (
    LOCK_FILE,
    LockedFile,
    LockedSource,
    read_lock,
    size_fault,
    write_lock,
)

WORKERS = 8


@dataclass(frozen=True)
class Job:
    """What is left to do for one source."""

    source: Source
    revision: str
    present: dict[str, LockedFile]
    """Files that are in the source's folder already, with the right content."""
    missing: list[Remote]


def with_needs(catalog: Catalog, names: Iterable[str]) -> list[Source]:
    """The sources of these names and everything that they need, each once."""
    sources: dict[str, Source] = {}
    for source in map(catalog.find, names):
        for each in (source, *map(catalog.find, source.needs)):
            sources[each.name] = each
    return list(sources.values())


def partial_path(weights_dir: Path, source: Source, remote: Remote) -> Path:
    """Where a file is written while it arrives. Its hash is part of the name, so that revisions never mix."""
    return weights_dir / PARTIAL / source.name / f"{remote.name}.{remote.content[:16]}"


def plan(source: Source, weights_dir: Path, locked: LockedSource | None, update: bool) -> Job | None:
    """Compares the files in the folder with those that the hub publishes.

    Args:
        source: what is to be downloaded.
        weights_dir: the weights folder.
        locked: what the lock file says about the source.
        update: whether to take the newest revision and not the recorded one.

    Returns:
        Job: None if every recorded file is there with its recorded size.

    Raises:
        WeightsError: the hub is out of reach, refuses, or lacks a file.
    """
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
    """The record of a file that is complete, from the lock file or from reading the file. None: it is not."""
    file = locked.files.get(remote.name) if locked else None
    if file and file.sha256 == remote.sha256:
        return None if size_fault(path, file) else file
    return remote.recognise(path)


def check_disk(weights_dir: Path, jobs: list[Job]) -> None:
    """Checks that the files that are still missing fit on the disk.

    Raises:
        WeightsError: they do not.
    """
    needed = 0
    for job in jobs:
        for remote in job.missing:
            partial = partial_path(weights_dir, job.source, remote)
            needed += remote.size - (partial.stat().st_size if partial.exists() else 0)
    free = shutil.disk_usage(weights_dir).free
    if needed > free:
        raise WeightsError(
            f"{in_bytes(needed)} are to come and {weights_dir} has {in_bytes(free)} free: make room, or name "
            "another folder with --weights-dir."
        )


def drop_stale(weights_dir: Path, jobs: list[Job]) -> None:
    """Removes partial files of other revisions, because no download would ever complete them."""
    for job in jobs:
        wanted = {partial_path(weights_dir, job.source, remote) for remote in job.missing}
        folder = weights_dir / PARTIAL / job.source.name
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.is_file() and path not in wanted:
                path.unlink()


def install(weights_dir: Path, job: Job, arrived: dict[str, LockedFile]) -> None:
    """Moves the files of a complete source into its folder and records them in the lock file."""
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
    """Context manager: locks the folder against a second download.

    The system releases the lock when this process ends, however it ends.

    Raises:
        WeightsError: another process holds the lock.
    """
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
    """Fetches the missing files of `sources`, several at a time.

    Raises:
        WeightsError: a file could not be fetched.
    """
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
            tqdm.write(f"{remote.label}: {in_bytes(remote.size)}")
            if len(files) == len(job.missing):
                install(weights_dir, job, files)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command. Returns the exit status."""
    catalog = read_catalog()
    names = ", ".join([*catalog.models, *catalog.parts, *catalog.aliases])
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
        hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # it would report retries; errors are one sentence here
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
    # Python would wait for the threads of other files, which may hang on a dead connection.
    os._exit(code)
