"""The folder of a job's outputs: audio files, results, and what a later run needs to resume the job.

    <id>.wav, <id>.mp3   the audio; a file that is there is whole
    results/             JSONL files with a line for each row that is made or has failed
    job.json             what must stay the same when the job is resumed
    log.txt              what the workers print, such as the cause of a failed row
    .unfinished/         files that are being made

Each run appends to a JSONL file of its own, so a line that a killed run wrote in part damages no other line.
Of several lines for a row the last one counts. When a run ends, all lines are merged into `results.jsonl`,
one for each row in the job's order. A row's file is renamed to its place before its line is written: a run
that is killed in between makes the row again.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from musicgen_svc.batch.job_file import JobError
from musicgen_svc.batch.rows import Row
from musicgen_svc.batch.work import MEASURED
from musicgen_svc.runtime.file_lock import locked

Json = dict[str, Any]

MERGED = "results.jsonl"
FORMATS = ("wav", "mp3")


class OutputFolder:
    """The folder of one job, which one run at a time writes."""

    def __init__(self, path: Path) -> None:
        """Reads the results of earlier runs. Use `open_folder`, which locks the folder."""
        self.path = path.absolute()
        self.unfinished = self.path / ".unfinished"
        self.log = self.path / "log.txt"
        self._results = self.path / "results"
        self._job = self.path / "job.json"
        self._lines: dict[str, str] = self._read_results()
        """The last line of each row as text, which takes a third of the memory of its values."""
        self._part: IO[str] | None = None
        shutil.rmtree(self.unfinished, ignore_errors=True)  # of a run that was killed
        for folder in (self._results, self.unfinished):
            folder.mkdir(exist_ok=True)

    @property
    def record(self) -> Json:
        """What the first run has recorded; empty before."""
        try:
            record: Json = json.loads(self._job.read_text())
        except FileNotFoundError:
            return {}
        return record

    def write_record(self, record: Json) -> None:
        """Records what must stay the same when the job is resumed."""
        _write_atomically(self._job, json.dumps(record) + "\n")

    def known(self, row: Row) -> Json | None:
        """Returns the line of a row that is made and whose inputs are unchanged, or None.

        Whether the clip's content and the model are unchanged as well is decided by the worker.
        """
        if row.id not in self._lines:
            return None
        line = json.loads(self._lines[row.id])
        if line["error"] is not None or not (self.path / str(line["path"])).is_file():
            return None
        return line if all(line[name] == value for name, value in row.fields.items()) else None

    def finish(self, row: Row, outcome: Json, audio: Path | None) -> None:
        """Puts a row's file into its place, and writes the row's line.

        Args:
            row: that was made or has failed.
            outcome: what is known of it beside its inputs, with `error`.
            audio: the complete file, on the same file system; None: the row has failed. Then the file of an
                earlier run is removed if it was made of other inputs.
        """
        stale = audio is not None or self.known(row) is None
        name = f"{row.id}.{row.fields['output_format']}" if audio else None
        values = {"id": row.id, **row.fields, **dict.fromkeys(MEASURED), **outcome, "path": name}
        line = json.dumps(values) + "\n"
        with _writing(self.path):
            if audio and name:
                audio.replace(self.path / name)
            for suffix in FORMATS:
                if stale and f"{row.id}.{suffix}" != name:
                    (self.path / f"{row.id}.{suffix}").unlink(missing_ok=True)
            if self._part is None:
                self._part = self._new_part().open("w", encoding="utf-8")
            self._part.write(line)
            self._part.flush()
        self._lines[row.id] = line

    def merge(self, rows: Iterable[Row]) -> Path:
        """Merges the lines of all runs into one file, atomically: this job's rows in order, then other rows.

        Returns:
            The file.
        """
        in_order = dict.fromkeys(row.id for row in rows if row.id in self._lines)
        self._lines = {row_id: self._lines[row_id] for row_id in in_order | self._lines}
        merged = self._results / MERGED
        with _writing(self.path):
            _write_atomically(merged, "".join(self._lines.values()))
            self.close()
            for part in self._parts():
                if part != merged:
                    part.unlink()
        return merged

    def close(self) -> None:
        """Closes this run's file of results, and removes what is unfinished."""
        if self._part is not None:
            self._part.close()
            self._part = None
        shutil.rmtree(self.unfinished, ignore_errors=True)

    def _parts(self) -> list[Path]:
        """Returns the files of results from the oldest to the newest: the merged one, then each run's."""
        merged = self._results / MERGED
        parts = sorted(self._results.glob("run-*.jsonl"))
        return [merged, *parts] if merged.exists() else parts

    def _new_part(self) -> Path:
        """Returns the path of the next run's file."""
        last = max(
            (int(part.stem.removeprefix("run-")) for part in self._results.glob("run-*.jsonl")), default=0
        )
        return self._results / f"run-{last + 1:06}.jsonl"

    def _read_results(self) -> dict[str, str]:
        """Reads the last whole line of each row."""
        lines: dict[str, str] = {}
        for part in self._parts():
            for content in part.read_bytes().splitlines(keepends=True):
                if not content.endswith(b"\n"):
                    continue  # the run was killed while it wrote the line
                text = content.decode()
                lines[json.loads(text)["id"]] = text
        return lines


@contextmanager
def open_folder(path: Path) -> Iterator[OutputFolder]:
    """Context manager that makes the folder of a job's outputs, or opens it, and locks it against other runs.

    Raises:
        JobError: another run writes into the folder, or the folder cannot be written.
    """
    with ExitStack() as stack:
        with _writing(path):
            path.mkdir(parents=True, exist_ok=True)
            if not stack.enter_context(locked(path / ".lock", wait=False)):
                raise JobError(
                    f"{path} is in use by another run, or its file system has no locks; wait for that run, "
                    "or give another folder."
                )
            folder = OutputFolder(path)
        stack.callback(folder.close)
        yield folder


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Context manager in which an error of the file system becomes one sentence."""
    try:
        yield
    except OSError as exc:
        raise JobError(
            f"{path} cannot be written ({exc.strerror}); make room there or give another folder."
        ) from exc


def _write_atomically(path: Path, text: str) -> None:
    """Writes a file that is there as a whole or not at all."""
    temporary = path.with_name(f"{path.name}.partial")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
