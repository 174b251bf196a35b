"""`scripts/batch`: a job of many rows, on this machine or on a Ray cluster."""

import argparse
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tqdm import tqdm

from musicgen_svc.batch.folder import OutputFolder, open_folder
from musicgen_svc.batch.job_file import JobError, import_parquet, read_job, write_parquet
from musicgen_svc.batch.processes import Fleet
from musicgen_svc.batch.rows import Row, settle
from musicgen_svc.batch.work import Plan, RunnerError, Task
from musicgen_svc.cli.predict import own_schema
from musicgen_svc.cli.schema_fields import fields, parsed
from musicgen_svc.cli.terminal import note
from musicgen_svc.errors import ServiceError
from musicgen_svc.runtime.json_object import Json
from musicgen_svc.settings import Settings

if TYPE_CHECKING:
    from musicgen_svc.batch.cluster import Cluster


MOST_FAILED = 100
CANNOT_RUN, USAGE, INTERRUPTED = 101, 102, 130

EPILOG = f"""\
JOBS is a .jsonl, .csv or .parquet file. Each row is a request; the columns are
the inputs of scripts/predict, and `id`, which names the row's file. The paths
of clips are relative to JOBS.

The same command resumes a job that was interrupted, and makes rows again that
have changed.

exit status:
  0    every row is made
  1-{MOST_FAILED}  so many rows failed, or more if it is {MOST_FAILED}; their errors are in the results
  {CANNOT_RUN}  nothing can be run here, for the reason on standard error
  {USAGE}  the command line or JOBS cannot be used; nothing was started
  {INTERRUPTED}  interrupted: the same command resumes the job

docs/batch.md has the rest."""


class _Parser(argparse.ArgumentParser):
    """A parser whose exit status for a wrong command line differs from any number of failed rows."""

    def error(self, message: str) -> NoReturn:
        """Prints the error, and ends the program."""
        self.print_usage(sys.stderr)
        self.exit(USAGE, f"{self.prog}: {message}\n")


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = _Parser(
        prog="scripts/batch",
        description="Makes an audio file for each row of a job.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("jobs", type=Path, metavar="JOBS", help="the rows")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the outputs go")
    parser.add_argument("--seed", type=_whole(0), default=0, help="of rows that have none; default 0")
    number: Json = {"type": _whole(1), "default": 0, "metavar": "N"}
    parser.add_argument("--slots", **number, help="how many rows a worker decodes at once")
    parser.add_argument("--workers", **number, help="how many workers run")
    parser.add_argument("--threads", **number, help="of each worker on a CPU")
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="run on a Ray cluster: auto (the one of this machine) or ray://HOST:PORT",
    )
    parser.add_argument("--parquet", action="store_true", help="also write the results as Parquet")
    return parser.parse_args(given)


def _whole(least: int) -> Any:
    """Returns a function that parses a whole number that is at least `least`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"it is {text!r}; it must be a whole number, at least {least}")
        return int(text)

    return parse


def read_rows(jobs: Path, seed: int, max_duration_s: int) -> list[Row]:
    """Reads a job file into rows.

    Raises:
        JobError: the file cannot be used.
    """
    inputs = fields(own_schema()) or {}
    written = read_job(jobs, inputs, lambda name, text: parsed(text, inputs[name]))
    defaults = {name: field.get("default") for name, field in inputs.items()}
    return settle(written, defaults=defaults, folder=jobs.parent, seed=seed, max_duration_s=max_duration_s)


def ray_runner() -> "type[Cluster]":
    """Imports what runs a job on a Ray cluster.

    Raises:
        JobError: Ray is not installed.
    """
    try:
        from musicgen_svc.batch.cluster import Cluster
    except ImportError:
        raise JobError(
            "--ray needs the Ray extra, which is not installed: scripts/batch installs it, and so does "
            "pip install --no-deps -r requirements-ray.lock."
        ) from None
    return Cluster


def planned(args: argparse.Namespace, folder: OutputFolder) -> Plan:
    """Returns the plan of a run. The number of threads is that of the folder's first run.

    Raises:
        JobError: another number of threads is asked for, with which the files might differ.
    """
    recorded = int(folder.record.get("threads", 0))
    if recorded and args.threads not in (0, recorded):
        raise JobError(
            f"--threads is {args.threads}, and the files in {folder.path} were made with {recorded}; leave "
            "it out, or give another folder."
        )
    return Plan(args.slots, args.threads or recorded, args.workers)


class Report:
    """Counts what happens to the rows, and shows it."""

    def __init__(self, rows: Sequence[Row]) -> None:
        """Opens the bar. Its unit is a second of audio that is to be generated."""
        self.counts: Counter[str] = Counter()
        self.audio_s = 0.0
        self._rows = len(rows)
        self._started_s = time.monotonic()
        self._bar = tqdm(
            total=sum(_size(row) for row in rows),
            file=sys.stderr,
            mininterval=0.25 if sys.stderr.isatty() else 30.0,
            bar_format="{percentage:3.0f}%|{bar:25}| {desc} [{elapsed}<{remaining}]",
        )

    def count(self, row: Row, outcome: Json) -> None:
        """Counts a row by its outcome."""
        kind = "failed" if outcome["error"] else "unchanged" if outcome.get("unchanged") else "made"
        self.counts[kind] += 1
        self.audio_s += outcome.get("audio_s", 0.0)
        if kind == "made":
            self._bar.update(_size(row))
        else:  # took no time, so it must not count for the time left
            self._bar.total = max(self._bar.total - _size(row), self._bar.n)
        done, failed = self.counts.total(), self.counts["failed"]
        self._bar.set_description_str(
            f"{done} of {self._rows} rows, {failed} failed, {self.rate:.1f} s of audio per s", refresh=False
        )

    @property
    def rate(self) -> float:
        """Seconds of audio that are made in a second."""
        return self.audio_s / max(time.monotonic() - self._started_s, 1e-9)

    def close(self) -> None:
        """Closes the bar."""
        self._bar.close()

    def summary(self) -> str:
        """Returns what has been done, in one line."""
        seconds = time.monotonic() - self._started_s
        counts = ", ".join(f"{self.counts[kind]} {kind}" for kind in ("made", "unchanged", "failed"))
        return f"{counts}: {self.audio_s:.1f} s of audio in {seconds:.1f} s, {self.rate:.2f} s of audio per s"


def _size(row: Row) -> int:
    """Returns the seconds of audio that count as a row's work. Encode-decode is little work."""
    return row.generated_s or 1


def run(args: argparse.Namespace) -> int:
    """Runs the command. Returns the exit status.

    Raises:
        JobError: the command line or the job file cannot be used.
        RunnerError: nothing can be run here.
    """
    try:
        settings = Settings.from_environment(os.environ)
    except ServiceError as exc:
        raise JobError(str(exc)) from None
    runner = ray_runner() if args.ray else None
    if args.parquet:
        import_parquet("--parquet")
    rows = read_rows(args.jobs, args.seed, settings.max_duration_s)
    with open_folder(args.out) as folder:
        plan = planned(args, folder)
        report = Report(rows)

        def settled(row: Row, outcome: Json, file: Path | None) -> None:
            if not outcome.get("unchanged"):
                folder.finish(row, outcome, file)
            report.count(row, outcome)

        try:
            tasks = []
            for row in rows:
                if row.error:
                    settled(row, {"error": row.error}, None)
                else:
                    tasks.append(Task(row, folder.known(row)))

            def decided(plan: Plan) -> None:
                folder.write_record({"seed": args.seed, "threads": plan.threads})

            if runner:
                runner(plan, args.ray, folder.unfinished, decided).run(tasks, settled)
            else:
                Fleet(plan, folder.unfinished, folder.log, decided).run(tasks, settled)
        finally:
            report.close()
        merged = folder.merge(rows)
        if args.parquet:
            write_parquet(merged)
        print(f"{merged}: {report.summary()}")
        return min(report.counts["failed"], MOST_FAILED)


def interrupt(*_: object) -> None:
    """Handles a signal like Ctrl-C."""
    raise KeyboardInterrupt


def main() -> int:
    """Runs the command and prints errors. Returns the exit status."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    try:
        return run(arguments())
    except (JobError, RunnerError) as error:
        note(str(error))
        return USAGE if isinstance(error, JobError) else CANNOT_RUN
    except KeyboardInterrupt:
        note("Interrupted. The same command resumes the job.")
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
