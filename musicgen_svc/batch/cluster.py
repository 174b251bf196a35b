"""Runs the tasks of a job on a Ray cluster, with Ray Data. Needs the Ray extra, and no torch itself.

There is one dataset for each model. Ray Data gives its rows to actors, each of which holds a `Worker`, as the
worker processes without Ray do. It keeps as many rows in flight as the actors can run, so memory does not
grow with the job. If an actor or its machine is lost, Ray starts another one and repeats its rows.

Ray Data does not run in a process that is connected by ray://, so the dataset belongs to an actor as well.
The bytes of each file come back to this process, which alone writes the folder of outputs. So the machines
need no folder in common, and each row is written once, however often it was run.
"""

import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import ray

from musicgen_svc.batch.cluster_workers import ClusterWorker, DatasetRun, probe
from musicgen_svc.batch.work import Plan, RunnerError, Settle, Task, TaskQueue
from musicgen_svc.errors import first_line

CONNECT_S = 10.0
"""How long to wait until something answers at an address."""
START_S = 180.0
"""For how long a connection that a cluster refuses is tried again."""
RETRY_S = 1.0
"""How long to wait before the connection is tried again."""


class Cluster:
    """A Ray cluster, for one run."""

    worker: type = ClusterWorker
    """What the actors hold."""

    def __init__(self, plan: Plan, address: str, unfinished: Path, decided: Callable[[Plan], None]) -> None:
        """Makes the runner, and connects to nothing yet.

        Args:
            plan: how many workers, with how many slots and threads.
            address: `auto`, or the URL of a cluster.
            unfinished: the folder in which files are written before they are renamed.
            decided: called once, before any row is settled, with the numbers that the cluster has decided.
        """
        self._plan, self._address, self._unfinished, self._decided = plan, address, unfinished, decided

    def run(self, tasks: Iterable[Task], settle: Settle) -> None:
        """Runs all tasks, and returns when each is settled.

        Raises:
            RunnerError: there is no such cluster, or it can run nothing.
        """
        groups = TaskQueue(tasks).by_model()
        if not groups:
            return
        with self._connected(), _errors():
            on_gpu = ray.cluster_resources().get("GPU", 0) >= 1
            self._decide(on_gpu, [group[0].row.model for group in groups])
            for group in groups:
                self._run(group, settle, on_gpu)

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        """Context manager in which this process is connected to the cluster."""
        settings = {
            name: value
            for name, value in os.environ.items()
            if name.startswith("MUSICGEN_") or name in ("COG_WEIGHTS", "OMP_NUM_THREADS")
        }
        _check_reachable(self._address)
        _connect(self._address, settings)
        try:
            yield
        finally:
            ray.shutdown()

    def _decide(self, on_gpu: bool, models: list[str]) -> None:
        """Decides the numbers of threads and of workers.

        Raises:
            RunnerError: the settings or the files of the cluster are wrong.
        """
        threads = self._plan.threads
        if not threads and not on_gpu:
            found = ray.get(ray.remote(probe).options(num_cpus=1).remote(self._plan, models))
            if "fault" in found:
                raise RunnerError(found["fault"])
            threads = found["threads"]
        there = ray.cluster_resources()
        fitting = there.get("GPU", 0) if on_gpu else there.get("CPU", 0) / threads
        self._plan = Plan(self._plan.slots, threads or 1, self._plan.workers or max(1, int(fitting)))
        self._decided(self._plan)

    def _run(self, tasks: list[Task], settle: Settle, on_gpu: bool) -> None:
        """Runs the tasks of one model, and of encode-decode."""
        pending = {task.row.id: task for task in tasks}
        messages = [json.dumps(task.message()) for task in tasks]
        options = ray.remote(DatasetRun).options(num_cpus=0)
        rows = options.remote(self.worker, messages, tasks[0].row.model, self._plan, on_gpu)
        while found := ray.get(rows.next.remote()):
            message, audio = json.loads(found[0]), found[1]
            if "fault" in message:
                raise RunnerError(message["fault"])
            settle(pending.pop(message["id"]).row, message["outcome"], self._file(audio))
        assert not pending, "Ray Data has lost rows"

    def _file(self, audio: bytes) -> Path | None:
        """Writes the bytes of a file, if there are any."""
        if not audio:
            return None
        path = self._unfinished / "audio"
        path.write_bytes(audio)
        return path


def _check_reachable(address: str) -> None:
    """Checks that something listens at an address, which Ray itself would wait for without an end.

    Raises:
        RunnerError: nothing does, or this is no address.
    """
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except (OSError, ValueError, OverflowError) as exc:
        raise _no_cluster(address, _first_line(exc)) from exc


def _connect(address: str, settings: dict[str, str]) -> None:
    """Connects this process to a cluster. A connection that the cluster refuses is tried again for `START_S`.

    For each connection by ray://, the cluster forks a process. It refuses the connection if that process has
    ended, or has not answered within 30 s. Some of these processes end at once by a fault in gRPC's fork
    handlers, which scripts/ray switches off; but the cluster may have been started in another way.

    Args:
        address: `auto`, or the URL of a cluster.
        settings: the environment variables of the workers.

    Raises:
        RunnerError: there is no such cluster, or it has refused all connections.
    """
    options = {"runtime_env": {"env_vars": settings}, "log_to_driver": False, "logging_level": logging.ERROR}
    deadline_s, refusal = time.monotonic() + START_S, None
    while refusal is None or time.monotonic() < deadline_s:
        try:
            ray.init(address, **options)
        except ConnectionAbortedError as exc:
            refusal = exc
            time.sleep(RETRY_S)
        except (ConnectionError, ValueError, RuntimeError) as exc:
            raise _no_cluster(address, _first_line(exc)) from exc
        else:
            return
    reason = str(refusal).strip().splitlines()[-1].rstrip(".")  # the last line of a traceback
    raise RunnerError(
        f"--ray is {address!r}, where a cluster has refused each connection for {START_S:g} s ({reason}); "
        "Ray's logs there have the cause."
    ) from refusal


def _no_cluster(address: str, reason: str) -> RunnerError:
    """Returns the error for an address without a cluster."""
    return RunnerError(
        f"--ray is {address!r}, where no cluster answers ({reason}); start one by scripts/ray start --head, "
        "and give auto or ray://HOST:10001."
    )


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Context manager in which an error of Ray's becomes one sentence."""
    try:
        yield
    except ray.exceptions.RayError as exc:
        raise RunnerError(f"Ray ended the job ({_first_line(exc)}); Ray's log has the cause.") from exc


def _first_line(exc: BaseException) -> str:
    """Returns the first line of an error's message, without a stop at its end."""
    return first_line(exc).rstrip(".")
