"""A worker process of the embedded runner: reads rows from standard input, and answers on standard output.

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
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO, Any

from musicgen_svc.batch.worker import Worker
from musicgen_svc.errors import ServiceError

Json = dict[str, Any]

_MAX_THREADS = 64
"""More rows than the runner sends at once. A thread that has started is used again for later rows."""


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


def main(unfinished: Path, slots: int, threads: int) -> None:
    """Serves until standard input ends.

    Args:
        unfinished: the folder for files that are being made.
        slots: of the engine; 0: what the device holds.
        threads: the number of threads for a row's computations; 0: what the model wants.
    """
    answers = _Answers(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    os.dup2(2, 1)
    try:
        worker = Worker(slots, threads)
    except ServiceError as exc:
        answers.send({"fault": str(exc)})
        return
    pool = ThreadPoolExecutor(_MAX_THREADS)
    for line in sys.stdin:
        message = json.loads(line)
        if "prepare" in message:
            pool.submit(_answer, answers, partial(_prepare, worker, message["prepare"]))
        else:
            pool.submit(_answer, answers, partial(_run, worker, message["row"], unfinished))
    os._exit(0)  # without waiting for rows whose outcome nobody reads


def _answer(answers: _Answers, work: Any) -> None:
    """Sends the message that `work` returns. If it raises, which no row's error does, the process ends."""
    try:
        message = work()
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    answers.send(message)


def _prepare(worker: Worker, model: str) -> Json:
    """Loads a model, and returns the message that says what can be run at once with it."""
    return {"capacity": worker.prepare(model)}


def _run(worker: Worker, row: Json, unfinished: Path) -> Json:
    """Runs a row, and returns the message with its outcome."""
    return {"id": row["id"], "outcome": worker.run(row, unfinished)}


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
