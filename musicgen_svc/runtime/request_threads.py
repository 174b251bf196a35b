"""Threads that run requests, for an event loop that must never be blocked.

Nothing of `concurrent.futures` is used here. It has one lock for the whole process, which every executor
takes to start a thread. Cog has executors of its own and cancels by raising an exception in their threads, so
this lock can stay locked for ever. Instead, the threads start with the service, a job reaches them through
a `SimpleQueue`, which uses no lock of Python's, and its outcome returns as a callback of the event loop.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from queue import SimpleQueue


class Job[T]:
    """A function that one thread runs once, unless it is withdrawn before."""

    def __init__(self, function: Callable[[], T], settle: Callable[[T | BaseException], object]) -> None:
        """Makes a job.

        Args:
            function: the work.
            settle: called in the thread with what the function returned or raised.
        """
        self._function = function
        self._settle = settle
        self._claim = threading.Lock()

    def withdraw(self) -> bool:
        """Prevents the job from being run. Returns False if a thread has already begun to run it."""
        return self._claim.acquire(blocking=False)

    def run(self) -> None:
        """Runs the job in the calling thread, unless it was withdrawn. Raises nothing."""
        if not self._claim.acquire(blocking=False):
            return
        outcome: T | BaseException
        try:
            outcome = self._function()
        except BaseException as exc:
            outcome = exc
        self._settle(outcome)


class RequestThreads:
    """A fixed number of threads that run jobs in the order of their submission, one per thread at a time."""

    def __init__(self, count: int) -> None:
        """Starts `count` daemon threads, which run until the process ends."""
        self._jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()
        for number in range(count):
            threading.Thread(target=self._work, name=f"request-{number}", daemon=True).start()

    def run[T](self, function: Callable[[], T]) -> T:
        """Runs a function on one of the threads and returns its result. Blocks until it has ended."""
        done: SimpleQueue[T | BaseException] = SimpleQueue()
        self._jobs.put(Job(function, done.put).run)
        outcome = done.get()
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def submit[T](self, function: Callable[[], T]) -> tuple[Job[T], "asyncio.Future[T]"]:
        """Runs a function on one of the threads; must be called in an event loop.

        Returns:
            The job, which can be withdrawn until a thread begins it, and the future of its outcome.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(outcome: T | BaseException) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed and nobody waits for the outcome
                loop.call_soon_threadsafe(_settle, future, outcome)

        job = Job(function, settle)
        self._jobs.put(job.run)
        return job, future

    def _work(self) -> None:
        """Runs jobs for ever."""
        while True:
            self._jobs.get()()


def _settle[T](future: "asyncio.Future[T]", outcome: T | BaseException) -> None:
    """Sets the outcome of a future, unless the future was cancelled."""
    if future.done():
        return
    if isinstance(outcome, BaseException):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
