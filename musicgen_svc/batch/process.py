"""A worker process of the embedded runner: reads rows from standard input, and answers on standard output.

    <- {"slots": 0, "threads": 0}           the first message, see `Worker`
    <- {"check": {...}}                     -> {"id": "...", "unchanged": true}
    <- {"prepare": "finetuned"}             -> {"capacity": {...}}
    <- {"row": {...}}                       -> {"id": "...", "outcome": {...}}
                                            -> {"fault": "..."}, and the process ends: nothing can be run here

Each message is one line of JSON. The process ends when standard input does, also if the parent
process was killed. What libraries print goes to standard error.
"""

import json
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from musicgen_svc.batch.work import CHECKS
from musicgen_svc.batch.worker import Worker
from musicgen_svc.errors import ServiceError

Json = dict[str, Any]


class _Answers:
    """Writes messages of several threads."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._lock = threading.Lock()

    def send(self, message: Json) -> None:
        """Writes one message."""
        with self._lock:
            self._file.write(json.dumps(message) + "\n")
            self._file.flush()


def main(unfinished: Path) -> None:
    """Serves until standard input ends. `unfinished`: the folder for files that are being made."""
    answers = _Answers(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    os.dup2(2, 1)
    first = sys.stdin.readline()
    if not first:
        return  # no worker is needed
    try:
        worker = Worker(**json.loads(first))
    except ServiceError as exc:
        answers.send({"fault": str(exc)})
        return
    pool = ThreadPoolExecutor(CHECKS)
    for line in sys.stdin:
        message = json.loads(line)
        if "check" in message:
            pool.submit(_check, answers, worker, message["check"], unfinished)
        elif "prepare" in message:  # nothing runs
            capacity = worker.prepare(message["prepare"])
            pool.shutdown()
            # No more threads than rows: what a thread has allocated stays with it.
            pool = ThreadPoolExecutor(capacity["rows"] if capacity else 1)
            answers.send({"capacity": capacity})
        else:
            pool.submit(_run, answers, worker, message["row"], unfinished)
    os._exit(0)  # without waiting for rows whose outcome nobody reads


def _check(answers: _Answers, worker: Worker, row: Json, unfinished: Path) -> None:
    """Finds out whether a row is unchanged, and sends the answer."""
    with _ending_the_process():
        answers.send({"id": row["id"], "unchanged": worker.unchanged(row, unfinished)})


def _run(answers: _Answers, worker: Worker, row: Json, unfinished: Path) -> None:
    """Makes a row, and sends its outcome."""
    with _ending_the_process():
        answers.send({"id": row["id"], "outcome": worker.run(row, unfinished)})


@contextmanager
def _ending_the_process() -> Iterator[None]:
    """Context manager that ends the process at any error. What is wrong with a row raises none here."""
    try:
        yield
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
