"""What of a job runs on a Ray cluster: the workers in Ray's processes, and the datasets of their rows."""

import contextlib
import importlib
import json
import os
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import ray
import ray.data

from musicgen_svc.batch.work import MAX_DEATHS, Json, Plan, died_sentence

GPU_ROWS = 20
"""Rows that are sent to a worker on a GPU at once: as many slots as any GPU has, and a few rows more."""
CPU_ROWS = 5
"""The same on a CPU."""


class Attempts:
    """Counts how often each row was begun. An actor of its own, because a lost worker forgets it."""

    def __init__(self) -> None:
        self._begun: Counter[str] = Counter()

    def earlier(self, row: str) -> int:
        """Returns how often a row was begun."""
        return self._begun[row]

    def begin(self, row: str) -> None:
        """Counts that a row is begun."""
        self._begun[row] += 1


class Places:
    """Lets so many rows run at once, or one alone."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._free = threading.Semaphore(count)
        self._entrance = threading.Lock()

    @contextlib.contextmanager
    def held(self, *, alone: bool) -> Iterator[None]:
        """Context manager that holds one place, or all of them."""
        wanted = self._count if alone else 1
        with self._entrance:  # one thread at a time collects its places, so no two wait for each other's
            for _ in range(wanted):
                self._free.acquire()
        try:
            yield
        finally:
            self._free.release(wanted)


class ClusterWorker:
    """A worker in one of Ray's processes. Ray Data calls it from several threads, each with one row."""

    def __init__(self, plan: Plan, model: str, attempts: Any) -> None:
        """Makes the worker. The model is loaded when a row must be made.

        Args:
            plan: slots and threads.
            model: that of the rows.
            attempts: the actor `Attempts`.
        """
        # By name, because the process that starts the job must not import torch.
        module = importlib.import_module("musicgen_svc.batch.worker")
        errors = importlib.import_module("musicgen_svc.errors")
        self._fatal = importlib.import_module("musicgen_svc.backend").DeviceError
        self._attempts = attempts
        self._model = model
        self._preparing = threading.Lock()
        self._places: Places | None = None
        self.fault: str | None = None
        self.capacity: Json | None = None
        try:
            self._worker = module.Worker(plan.slots, plan.threads)
        except errors.ServiceError as exc:
            self.fault = str(exc)
            return
        self._folder = Path(tempfile.mkdtemp(prefix="musicgen-batch-"))

    def prepare(self) -> Places:
        """Loads the model once, and returns the places for its rows."""
        with self._preparing:
            if self._places is None:
                self.capacity = self._worker.prepare(self._model)
                self._places = Places(self.capacity["rows"] if self.capacity else 1)
            return self._places

    def __call__(self, batch: pyarrow.Table) -> pyarrow.Table:
        """Makes a row that has changed. A row with which a worker was lost before is made alone.

        It fails after some attempts.
        """
        if self.fault is not None:
            return _table({"fault": self.fault}, b"")
        task = json.loads(batch["task"][0].as_py())
        if task["known"] and self._worker.unchanged(task, self._folder):
            return _table({"id": task["id"], "outcome": {"error": None, "unchanged": True}}, b"")
        earlier = ray.get(self._attempts.earlier.remote(task["id"]))
        if earlier >= MAX_DEATHS:
            return _table({"id": task["id"], "outcome": {"error": died_sentence("Ray's log")}}, b"")
        with self.prepare().held(alone=earlier > 0):
            ray.get(self._attempts.begin.remote(task["id"]))
            outcome = self._run(task)
        audio = b""
        if file := outcome.pop("file", None):
            audio = Path(file).read_bytes()
            Path(file).unlink()
        return _table({"id": task["id"], "outcome": outcome}, audio)

    def _run(self, task: Json) -> Json:
        """Runs a row. Ends the process if its device has failed, so that Ray starts another one."""
        try:
            outcome: Json = self._worker.run(task, self._folder)
        except self._fatal:
            os._exit(1)
        return outcome


def _table(message: Json, audio: bytes) -> pyarrow.Table:
    """Returns a table of one row."""
    return pyarrow.table(
        {"message": [json.dumps(message)], "audio": pyarrow.array([audio], pyarrow.binary())}
    )


def probe(plan: Plan, models: list[str]) -> Json:
    """Returns the threads of the first model that loads, or why nothing runs. It runs on the cluster."""
    for model in models:
        worker = ClusterWorker(plan, model, None)
        if worker.fault is not None:
            return {"fault": worker.fault}
        worker.prepare()
        if worker.capacity:
            return {"threads": worker.capacity["threads"]}
    return {"threads": 1}


class DatasetRun:
    """The dataset of one model's rows, and the workers that run them. An actor on the cluster."""

    def __init__(self, worker: type, messages: list[str], model: str, plan: Plan, on_gpu: bool) -> None:
        """Describes the dataset. The first call of `next` starts it.

        Args:
            worker: the class `ClusterWorker`.
            messages: the tasks as JSON.
            model: that of the rows.
            plan: slots, threads and workers.
            on_gpu: whether each worker has a GPU.
        """
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        rows = max(GPU_ROWS if on_gpu else CPU_ROWS, plan.slots + plan.slots // 4)
        tasks = [{"task": message} for message in messages]
        made = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(
            worker,
            fn_constructor_args=(plan, model, ray.remote(Attempts).options(num_cpus=0).remote()),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=1 if on_gpu else plan.threads,
            num_gpus=1 if on_gpu else 0,
            compute=ray.data.ActorPoolStrategy(
                size=min(plan.workers, len(tasks)),
                max_tasks_in_flight_per_actor=rows + 1,
                max_concurrent_calls_per_actor=rows,
                enable_true_multi_threading=True,
            ),
        )
        self._tables = iter(made.iter_batches(batch_size=1, batch_format="pyarrow"))

    def next(self) -> tuple[str, bytes] | None:
        """Waits for the next row. Returns its message and the bytes of its file; None: there are no more."""
        table = next(self._tables, None)
        return None if table is None else (table["message"][0].as_py(), table["audio"][0].as_py())
