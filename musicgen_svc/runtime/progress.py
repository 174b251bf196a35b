"""What a running request tells the world, and how the world stops it.

Everything below the pipeline reports through a `Tick`, and a tick may raise: that is how a
cancelled or overdue request unwinds, from wherever it is.
"""

import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from tqdm import tqdm

from musicgen_svc.errors import GenerationError, Stopped
from musicgen_svc.runtime.ticks import Tick


class StopFlag:
    """One request's end from outside: cancelled by the client, or out of time."""

    def __init__(self, limit_s: float) -> None:
        self._cancelled = threading.Event()
        self._limit_s = limit_s
        self._started_s: float | None = None

    def start_clock(self) -> None:
        """The wall-clock limit counts from here: waiting for the device is not the request's fault."""
        self._started_s = time.monotonic()

    @contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """Waiting for another request does not count either."""
        started_s, self._started_s = self._started_s, None
        began_s = time.monotonic()
        try:
            yield
        finally:
            if started_s is not None:
                self._started_s = started_s + time.monotonic() - began_s

    def cancel(self) -> None:
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def check(self) -> None:
        """Raises when the request must end.

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


class _Bar(tqdm):  # type: ignore[misc]  # tqdm has no types
    """tqdm's, on its own: it moves the cursor for no other bar, and no thread of tqdm's draws it."""

    monitor_interval = 0


class Progress:
    """One bar from 0 to 100 % over all stages of a request, in the log as tqdm prints it."""

    def __init__(self, weights: Mapping[str, float], stop: StopFlag) -> None:
        """`weights`: the stages in order, with the share of the whole time that each is expected to take."""
        self._stop = stop
        self._total = sum(weights.values())
        self._weights = dict(weights)
        self._before = 0.0
        self.seconds: dict[str, float] = dict.fromkeys(weights, 0.0)
        self._bar = _Bar(
            total=100,
            position=0,
            file=sys.stderr,
            mininterval=0.25,
            bar_format="{percentage:3.0f}%|{bar:25}| {desc} [{elapsed}<{remaining}]",
        )

    def check(self) -> None:
        """Raises when the request must end, see `StopFlag.check`."""
        self._stop.check()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The stage `queue`: the request waits for others, and its clock is stopped."""
        with self.stage("queue"), self._stop.clock_stopped():
            yield

    @contextmanager
    def stage(self, name: str) -> Iterator[Tick]:
        """Times a stage and hands out its tick. Stages left out or repeated never move the bar back."""
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
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        self._before += weight
        self._show(self._before)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Closes the bar: at 100 % if all went well, else where it stands."""
        if kind is None:
            self._show(self._total)
        self._bar.close()

    def _show(self, reached: float) -> None:
        percent = int(100 * reached / self._total + 1e-9)
        if percent > self._bar.n:
            self._bar.update(percent - self._bar.n)
