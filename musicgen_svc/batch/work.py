"""What the runners of a job share: tasks, outcomes, and the order of rows. Needs no torch."""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from musicgen_svc.batch.rows import Row

Json = dict[str, Any]

ENCODE_DECODE = "encode-decode"
STAGES = ("queue", "load", "condition", "generate", "decode", "write")
"""The stages of a row whose seconds are recorded."""
MADE_OF = ("model_sha256", "parts_sha256", "clip_sha256")
"""The hashes of what a row's file is made of beside its inputs."""
MEASURED = (
    *MADE_OF, "device", "threads", "precision", "audio_s", "loudness_lufs",
    *(f"{stage}_s" for stage in STAGES),
)  # fmt: skip
"""What a row's line has beside its id, inputs, path and error; null if the row has failed."""
CHECKS = 8
"""How many rows at once are checked whether they have changed. Most of the time goes into fetching clips."""
MAX_DEATHS = 3
"""How often a worker may end while it runs the same row, before the row counts as failed."""


class RunnerError(Exception):
    """No worker can run anything here. The message is one sentence."""


@dataclass(frozen=True)
class Plan:
    """What the user or an earlier run has decided; 0: the machine and the model decide."""

    slots: int
    """Of each worker's engine."""
    threads: int
    """For the computations of one worker on a CPU."""
    workers: int


@dataclass(frozen=True)
class Capacity:
    """What a worker has found out about its machine and a model."""

    device: str
    threads: int
    """For the computations of this worker on a CPU."""
    rows: int
    """How many rows to run at once in this worker."""
    workers: int
    """How many such workers the machine can run."""


@dataclass(frozen=True)
class Task:
    """A row as a worker gets it."""

    row: Row
    known: Json | None
    """The row's line from an earlier run, if its inputs are unchanged."""

    def message(self) -> Json:
        """Returns the task as JSON."""
        known = self.known and {name: self.known.get(name) for name in MADE_OF}
        return {"id": self.row.id, "fields": self.row.fields, "clip": self.row.clip, "known": known}


Settle = Callable[[Row, Json, Path | None], None]
"""Called once for each row, with its outcome and the complete file, if there is one.

The outcome has `error`, a sentence or None, and `unchanged`, or what was measured.
"""


class TaskQueue:
    """The tasks that no worker has yet.

    Tasks are taken model by model, so that each model is loaded once. Those of encode-decode need no language
    model and may be taken beside any other.
    """

    def __init__(self, tasks: Iterable[Task]) -> None:
        self._pending: dict[str, deque[Task]] = {}
        for task in tasks:
            self._pending.setdefault(task.row.model, deque()).append(task)

    def __len__(self) -> int:
        return sum(map(len, self._pending.values()))

    def take(self, model: str | None, *, busy: bool) -> Task | None:
        """Takes the next task for a worker.

        Args:
            model: that the worker has loaded last, or None.
            busy: whether the worker still runs requests for this model, and so can run no other one.

        Returns:
            The task, or None: there is none that the worker can run now.
        """
        others = [
            name for name, tasks in self._pending.items() if tasks and name not in (model, ENCODE_DECODE)
        ]
        order = [model, *(() if busy else others[:1]), ENCODE_DECODE]
        for name in order:
            if name and self._pending.get(name):
                return self._pending[name].popleft()
        return None

    def by_model(self) -> list[list[Task]]:
        """Returns all tasks in the order in which one worker would take them: one list for each model."""
        last = list(self._pending.get(ENCODE_DECODE, ()))
        lists = [list(tasks) for name, tasks in self._pending.items() if name != ENCODE_DECODE]
        if not last or not lists:
            return lists or ([last] if last else [])
        lists[-1] += last
        return lists


def died_sentence(log: str) -> str:
    """Returns the error of a row that has ended its worker too often. `log`: where the cause is."""
    return f"The worker process ended {MAX_DEATHS} times while it made this row; {log} has the cause."
