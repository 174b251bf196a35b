"""A running request's progress bar and stage times, and the flag that stops it.

All long work below the pipeline calls a `Tick`. A tick raises when the request was cancelled or has run too
long, and the error unwinds the request from wherever it is.
"""

import io
import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

from tqdm import tqdm

from musicgen_svc.errors import GenerationError, Stopped
from musicgen_svc.runtime.ticks import Tick

Log = Literal["text", "json", "none"]
"""What a request prints. `text`: a bar, and its stages' times in one line at the end. `json`: a bar, and each
stage at its end as a JSON object. `none`: nothing."""


class StopFlag:
    """Tells a request when it must end: the client cancelled it, or its time is over."""

    def __init__(self, limit_s: float) -> None:
        """`limit_s`: the request's longest running time in seconds, without the time in which it waits."""
        self._cancelled = threading.Event()
        self._limit_s = limit_s
        self._started_s: float | None = None

    def start_clock(self) -> None:
        """Starts the clock of the time limit. Called after queueing, which does not count."""
        self._started_s = time.monotonic()

    @contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """Context manager that stops the clock while the request waits for other requests."""
        started_s, self._started_s = self._started_s, None
        began_s = time.monotonic()
        try:
            yield
        finally:
            if started_s is not None:
                self._started_s = started_s + time.monotonic() - began_s

    def cancel(self) -> None:
        """Makes the next `check` raise `Stopped`. May be called from any thread."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled.is_set()

    def check(self) -> None:
        """Raises if the request must end; otherwise does nothing.

        Raises:
            Stopped: the client cancelled or hung up.
            GenerationError: the request ran longer than its limit.
        """
        if self._cancelled.is_set():
            raise Stopped
        if self._started_s is not None and time.monotonic() - self._started_s > self._limit_s:
            raise GenerationError(
                f"The request ran longer than the limit of {self._limit_s:g} s (MUSICGEN_MAX_REQUEST_S): "
                "ask for a shorter duration."
            )


class _Nowhere(io.StringIO):
    """A file that keeps nothing."""

    def write(self, text: str) -> int:
        """Drops the text."""
        return len(text)


class _Bar(tqdm):  # type: ignore[misc]  # tqdm has no types
    """A tqdm bar that leaves room for no other bar, and that no monitor thread of tqdm redraws."""

    monitor_interval = 0


class Progress:
    """One tqdm bar from 0 to 100 % over all stages of a request, printed to the log, and their times."""

    def __init__(self, weights: Mapping[str, float], stop: StopFlag, log: Log = "text") -> None:
        """Opens the bar.

        Args:
            weights: the stages in order, with the share of the whole time that each is expected to take.
            stop: is checked at every tick.
            log: what is printed.
        """
        self._log = log
        self._stop = stop
        self._total = sum(weights.values())
        self._weights = dict(weights)
        self._before = 0.0
        self.seconds: dict[str, float] = dict.fromkeys(weights, 0.0)
        self._bar = _Bar(
            total=100,
            position=0,
            file=_Nowhere() if log == "none" else sys.stderr,
            mininterval=0.25,
            bar_format="{percentage:3.0f}%|{bar:25}| {desc} [{elapsed}<{remaining}]",
        )

    def check(self) -> None:
        """Raises if the request must end, see `StopFlag.check`."""
        self._stop.check()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Context manager of the stage `queue`, in which the request waits and its clock is stopped."""
        with self.stage("queue"), self._stop.clock_stopped():
            yield

    def show_position(self, before: int) -> None:
        """Shows how many requests wait before this one."""
        text = f"queue ({before} before this one)"
        if text != self._bar.desc:
            self._bar.set_description_str(text)

    @contextmanager
    def stage(self, name: str) -> Iterator[Tick]:
        """Context manager that measures a stage and yields its tick.

        A stage may be left out or repeated; the bar never moves back.
        """
        weight = self._weights.pop(name, 0.0)
        self._stop.check()
        if name != self._bar.desc:
            self._bar.set_description_str(name)

        def tick(done: int, total: int) -> None:
            self._stop.check()
            self._show(self._before + weight * min(done / max(total, 1), 1.0))

        start = time.perf_counter()
        try:
            yield tick
        finally:
            took_s = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + took_s
            if self._log == "json":
                print(json.dumps({"stage": name, "seconds": round(took_s, 4)}))
        self._before += weight
        self._show(self._before)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Closes the bar: at 100 % if there was no error, else where it is."""
        if error is None:
            self._show(self._total)
        self._bar.close()
        if self._log == "text":
            stages = ", ".join(f"{name} {took_s:.1f}" for name, took_s in self.seconds.items() if took_s)
            print(f"seconds: {stages}")

    def _show(self, reached: float) -> None:
        """Moves the bar to `reached`, in units of the weights, unless it is there already."""
        percent = int(100 * reached / self._total + 1e-9)
        if percent > self._bar.n:
            self._bar.update(percent - self._bar.n)
