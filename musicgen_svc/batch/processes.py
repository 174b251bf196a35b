"""Runs the tasks of a job in worker processes on this machine. Needs no torch itself.

On a GPU there is one worker with as many slots as the GPU holds; several GPUs have a worker each. On a CPU
there are as many workers as its cores allow with the model's number of threads: only one thread at a time
computes in a worker, because its requests share one device. A worker that ends on the way is started again,
and its rows then run one at a time, so that a row that ends its worker takes no other row with it.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable
from pathlib import Path
from queue import SimpleQueue
from typing import IO

from musicgen_svc.batch.work import (
    CHECKS,
    MAX_DEATHS,
    Capacity,
    Json,
    Plan,
    RunnerError,
    Settle,
    Task,
    TaskQueue,
    died_sentence,
)
from musicgen_svc.runtime.machine import cores

WORKER_MODULE = "musicgen_svc.batch.process"
_Event = tuple["_Worker", Json | None]
"""A message of a worker; None: the worker has ended."""


class _Worker:
    """One worker process, as `process.py` runs it, and what it does now."""

    def __init__(self, number: int, device: str | None, unfinished: Path, log: IO[str]) -> None:
        """Starts the process, which imports its modules and then waits for `begin`.

        Args:
            number: from 0.
            device: the GPU to use; None: as the settings say.
            unfinished: the folder for files that are being made.
            log: where the process's standard error goes.
        """
        self.number = number
        self.model: str | None = None
        self.preparing: Task | None = None
        self.running: dict[str, Task] = {}
        self.rows = 0
        self._reader: threading.Thread | None = None
        self.alone = False
        """Whether it runs a row that may end it, and so no other."""
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", WORKER_MODULE, unfinished],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, encoding="utf-8",
            env=os.environ | ({"MUSICGEN_DEVICE": device} if device else {}),
            process_group=0,  # Ctrl-C is for the parent, which ends the workers
        )  # fmt: skip

    def send(self, message: Json) -> None:
        """Sends a message. If the process has ended, its event will say so."""
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except OSError:
            return

    def begin(self, plan: Plan, events: "SimpleQueue[_Event]") -> None:
        """Makes it a worker with the plan's numbers of slots and threads.

        From now on every message of the process is put into a queue, and None when it has ended.
        """
        self.send({"slots": plan.slots, "threads": plan.threads})
        self._reader = threading.Thread(target=self._forward, args=[events], daemon=True)
        self._reader.start()

    def _forward(self, events: "SimpleQueue[_Event]") -> None:
        """Puts the messages of the process into a queue."""
        assert self._process.stdout
        for line in self._process.stdout:
            if line.endswith("\n"):  # else it was killed while it wrote
                events.put((self, json.loads(line)))
        self._process.wait()
        events.put((self, None))

    def end(self) -> None:
        """Ends the process at once."""
        self._process.kill()
        self._process.wait()
        if self._reader:
            self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                with contextlib.suppress(OSError):  # a message that the process did not read
                    pipe.close()


class Fleet:
    """The worker processes of one run."""

    def __init__(self, plan: Plan, unfinished: Path, log: Path, decided: Callable[[Plan], None]) -> None:
        """Makes a fleet of which no process is started yet.

        Args:
            plan: how many workers, with how many slots and threads.
            unfinished: the folder for files that are being made.
            log: the file to which the workers' standard error is appended.
            decided: called once, before any row is settled, with the numbers that the machine and the first
                model have decided.
        """
        self._plan, self._decided = plan, decided
        self._device = "cpu"
        self._unfinished, self._log = unfinished, log
        self._events: SimpleQueue[_Event] = SimpleQueue()
        self._workers: dict[int, _Worker] = {}
        self._second: _Worker | None = None
        """A process that imports its modules while the first one loads a model."""
        self._deaths: Counter[str] = Counter()
        self._failed_starts = 0
        self._grown = False
        self._suspects: deque[Task] = deque()

    def run(self, tasks: Iterable[Task], settle: Settle) -> None:
        """Runs all tasks, and returns when each is settled.

        Raises:
            RunnerError: no worker can run anything.
        """
        tasks = list(tasks)
        try:
            changed = self._changed([task for task in tasks if task.known], settle)
            queue = TaskQueue(task for task in tasks if not task.known or task.row.id in changed)
            self._most = self._plan.workers or len(queue)
            if min(self._most, cores()) > 1:
                self._second = self._process(1, None)
            while len(queue) or self._suspects or any(worker.running for worker in self._workers.values()):
                if not self._workers:
                    self._start(0)
                for worker in self._workers.values():
                    self._feed(worker, queue)
                worker, message = self._events.get()
                if message is None:
                    self._ended(worker, settle)
                else:
                    self._received(worker, message, settle)
        finally:
            for worker in (*self._workers.values(), *filter(None, [self._second])):
                worker.end()

    def _changed(self, tasks: list[Task], settle: Settle) -> set[str]:
        """Settles the rows that are unchanged, without loading a model. Returns the ids of the other rows."""
        waiting, changed = deque(tasks), set[str]()
        while waiting or (self._workers and self._workers[0].running):
            if not self._workers:
                self._start(0)
            worker = self._workers[0]
            while waiting and len(worker.running) < CHECKS:
                task = waiting.popleft()
                worker.running[task.row.id] = task
                worker.send({"check": task.message()})
            worker, message = self._events.get()
            if message is None:  # whatever has ended it, making these rows will show it
                changed |= worker.running.keys()
                worker.running.clear()
                self._ended(worker, settle)
            elif "fault" in message:
                raise RunnerError(message["fault"])
            else:
                task = worker.running.pop(message["id"])
                if message["unchanged"]:
                    settle(task.row, {"error": None, "unchanged": True}, None)
                else:
                    changed.add(task.row.id)
        return changed

    def _start(self, number: int) -> None:
        """Starts the worker with this number, or starts it again."""
        device = f"cuda:{number}" if self._device.startswith("cuda") and number else None
        self._workers[number] = self._process(number, device)
        self._workers[number].begin(self._plan, self._events)

    def _process(self, number: int, device: str | None) -> _Worker:
        """Starts a process. `device`: the GPU to use; None: as the settings say."""
        with self._log.open("a") as log:
            return _Worker(number, device, self._unfinished, log)

    def _feed(self, worker: _Worker, queue: TaskQueue) -> None:
        """Sends a worker as many tasks as it can run now."""
        while worker.preparing is None and not worker.alone:
            if self._suspects and not worker.running:
                task: Task | None = self._suspects.popleft()
                worker.alone = True
            elif worker.model is not None and len(worker.running) >= worker.rows:
                return
            else:
                task = queue.take(worker.model, busy=bool(worker.running))
            if task is None:
                return
            worker.running[task.row.id] = task
            if worker.running.keys() == {task.row.id} and task.row.model != worker.model:
                worker.preparing = task
                worker.send({"prepare": task.row.model})
            else:
                worker.send({"row": task.message()})

    def _received(self, worker: _Worker, message: Json, settle: Settle) -> None:
        """Handles a message of a worker."""
        if "fault" in message:
            raise RunnerError(message["fault"])
        if "capacity" in message:
            assert worker.preparing
            capacity = Capacity(**message["capacity"]) if message["capacity"] else None
            worker.model, worker.rows = worker.preparing.row.model, capacity.rows if capacity else 1
            worker.send({"row": worker.preparing.message()})
            worker.preparing = None
            self._failed_starts = 0
            if capacity and not self._grown:
                self._grow(capacity)
            return
        task, outcome = worker.running.pop(message["id"]), message["outcome"]
        worker.alone = False
        file = outcome.pop("file", None)
        settle(task.row, outcome, Path(file) if file else None)

    def _grow(self, capacity: Capacity) -> None:
        """Starts the other workers, when the first one has found out how many there can be."""
        self._grown, self._device = True, capacity.device
        workers = self._plan.workers or capacity.workers
        self._plan = Plan(self._plan.slots, capacity.threads, workers)
        self._decided(self._plan)
        if self._second and workers > 1 and self._device == "cpu":  # else a GPU's number must be given to it
            self._workers[1], self._second = self._second, None
            self._workers[1].begin(self._plan, self._events)
        for number in range(1, min(workers, self._most)):
            if number not in self._workers:
                self._start(number)

    def _ended(self, worker: _Worker, settle: Settle) -> None:
        """Starts a worker again that has ended, and keeps its tasks to run one at a time.

        Raises:
            RunnerError: workers end again and again while they load a model.
        """
        worker.end()
        if worker.preparing or worker.model is None:
            self._failed_starts += 1
            if self._failed_starts >= MAX_DEATHS:
                raise RunnerError(
                    f"The workers ended {MAX_DEATHS} times before a model was loaded; {self._log} says why."
                )
        for task in worker.running.values():
            if task is not worker.preparing:
                self._deaths[task.row.id] += 1
            if self._deaths[task.row.id] < MAX_DEATHS:
                self._suspects.append(task)
            else:
                settle(task.row, {"error": died_sentence(self._log.name)}, None)
        self._start(worker.number)
