"""Threads that run requests, for an event loop that must never be blocked.

`concurrent.futures` has a lock that every executor of the process takes to start a thread. Cog makes
executors of its own, and cancels by throwing an exception into their threads, so that this lock can stay
taken for ever. Therefore nothing of `concurrent.futures` is used here: the threads start with the service,
a job goes to them through a queue without locks of Python, and its outcome comes back as a callback of
the loop.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from queue import SimpleQueue


class Job[T]:
    """A function that a thread runs, or that nobody runs because it was withdrawn first."""

    def __init__(self, function: Callable[[], T], settle: Callable[[T | BaseException], object]) -> None:
        """`settle`: called in the thread with what the function returned or raised."""
        self._function = function
        self._settle = settle
        self._claim = threading.Lock()

    def withdraw(self) -> bool:
        """Keeps the job from being run. False: a thread has begun to run it."""
        return self._claim.acquire(blocking=False)

    def run(self) -> None:
        """Runs the job in the calling thread, unless it was withdrawn."""
        if not self._claim.acquire(blocking=False):
            return
        outcome: T | BaseException
        try:
            outcome = self._function()
        except BaseException as exc:
            outcome = exc
        self._settle(outcome)


class RequestThreads:
    """A fixed number of threads. Each runs one job at a time, in the order in which the jobs came."""

    def __init__(self, count: int) -> None:
        self._jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()
        for number in range(count):
            threading.Thread(target=self._work, name=f"request-{number}", daemon=True).start()

    def run[T](self, function: Callable[[], T]) -> T:
        """Runs a function on one of the threads, and blocks until it has ended."""
        done: SimpleQueue[T | BaseException] = SimpleQueue()
        self._jobs.put(Job(function, done.put).run)
        outcome = done.get()
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def submit[T](self, function: Callable[[], T]) -> tuple[Job[T], "asyncio.Future[T]"]:
        """Runs a function on one of the threads. Called by the event loop, which awaits the future."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(outcome: T | BaseException) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has been closed, and nobody waits any more
                loop.call_soon_threadsafe(_settle, future, outcome)

        job = Job(function, settle)
        self._jobs.put(job.run)
        return job, future

    def _work(self) -> None:
        while True:
            self._jobs.get()()


def _settle[T](future: "asyncio.Future[T]", outcome: T | BaseException) -> None:
    if future.done():
        return
    if isinstance(outcome, BaseException):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
