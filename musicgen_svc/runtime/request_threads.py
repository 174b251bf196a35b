"""Threads that run requests, for an event loop that must never be blocked.

Nothing of `concurrent.futures` is used here. It has one lock for the whole process, which every executor
takes to start a thread. Cog has executors of its own and cancels by raising an exception in their threads, so
this lock can stay locked for ever. Instead, the threads start with the service, a job reaches them through
a `SimpleQueue`, which uses no lock of Python's, and its outcome returns as a callback of the event loop.
"""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue

type _Jobs = SimpleQueue[Callable[[], Callable[[], object]]]


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

    def run(self) -> Callable[[], object]:
        """Runs the job in the calling thread, unless it was withdrawn. Raises nothing.

        Returns:
            What reports the outcome, for the thread to call as its last work for this job.
        """
        if not self._claim.acquire(blocking=False):
            return lambda: None
        try:
            outcome: T | BaseException = self._function()
        except BaseException as exc:
            outcome = exc
        return lambda: self._settle(outcome)


class RequestThreads:
    """A fixed number of threads that run jobs in the order of their submission, one per thread at a time.

    A job goes to the thread that has been idle for the shortest time. So requests that follow each other run
    on one thread, which keeps what libraries make for each thread, see `loading/warm_up.py`.
    """

    def __init__(self, count: int) -> None:
        """Starts `count` daemon threads, which run until the process ends."""
        self._jobs: _Jobs = SimpleQueue()
        self._idle: deque[_Jobs] = deque()  # the threads' own queues; `append` and `pop` need no lock
        for number in reversed(range(count)):
            own: _Jobs = SimpleQueue()
            self._idle.append(own)
            threading.Thread(target=self._work, args=(own,), name=f"request-{number}", daemon=True).start()

    def run[T](self, function: Callable[[], T]) -> T:
        """Runs a function on one of the threads and returns its result. Blocks until it has ended."""
        done: SimpleQueue[T | BaseException] = SimpleQueue()
        self._jobs.put(Job(function, done.put).run)
        self._assign()
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
        self._assign()
        return job, future

    def _assign(self) -> None:
        """Gives jobs to idle threads while there are both.

        It is called after each change that may allow it, and looks for jobs after it has changed the idle
        threads. So no job is left waiting beside an idle thread.
        """
        while not self._jobs.empty():
            try:
                thread = self._idle.pop()
            except IndexError:
                return
            try:
                thread.put(self._jobs.get_nowait())
            except Empty:  # another call was faster
                self._idle.append(thread)

    def _work(self, own: _Jobs) -> None:
        """Runs jobs for ever."""
        while True:
            report = own.get()()
            self._idle.append(own)  # before the report, so that the next job comes to this thread
            report()
            self._assign()


def _settle[T](future: "asyncio.Future[T]", outcome: T | BaseException) -> None:
    """Sets the outcome of a future, unless the future was cancelled."""
    if future.done():
        return
    if isinstance(outcome, BaseException):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
