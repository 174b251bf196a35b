"""A fair queue for threads that must stay cancellable while they wait.

It has three uses: the device, which one thread uses at a time and yields between pieces of its work; the
engine's slots; and MultiBand Diffusion, which one request uses at a time.
"""

import threading
import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from musicgen_svc.runtime.ticks import CHECK_S, Check

TURN_S = 0.1
"""After how long a holder yields its turn if others wait, and if its work can be interrupted."""


@dataclass(eq=False)
class _Entry:
    """A thread in the queue, which waits for the resource or holds it."""

    group: Hashable
    acquired: threading.Event = field(default_factory=threading.Event, init=False)
    """Is set while the thread holds the resource."""

    def wait(self, check: Check) -> None:
        """Blocks until the thread holds the resource. Calls `check` meanwhile, which may raise to give up."""
        while not self.acquired.wait(CHECK_S):
            check()


class Turn:
    """The time in which a thread holds the resource, which the thread can yield to others and have again."""

    def __init__(self, queue: "FairQueue", entry: _Entry) -> None:
        """Begins a turn of a thread that holds the resource. `queue`: has the thread's entry."""
        self._queue, self._entry = queue, entry
        self._since_s = time.monotonic()

    @property
    def over(self) -> bool:
        """Whether the turn has lasted `TURN_S` and other threads wait."""
        return time.monotonic() - self._since_s >= TURN_S and self._queue.crowded

    def yield_turn(self, check: Check) -> None:
        """Moves the thread to the end of the queue, and returns when it holds the resource again.

        If `check` raises, the thread is the next one to hold the resource, and only then is the error raised:
        the code that the error unwinds holds the resource, and may use it to clean up.
        """
        self._queue.move_back(self._entry)
        try:
            self._entry.wait(check)
        except BaseException:
            self._queue.move_forward(self._entry)
            self._entry.acquired.wait()
            raise
        self._since_s = time.monotonic()

    def join_group(self, group: Hashable) -> None:
        """Moves the thread to another group, and admits the threads that may now share the resource."""
        self._entry.group = group
        self._queue.admit()


class FairQueue:
    """A queue that admits at most `at_once` holders at a time, all of one group, in order of arrival.

    The holders are at the head of the queue, and all of them belong to the group of the first one. A thread
    of another group waits until all threads before it have left, and every later thread waits behind it.
    """

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._lock = threading.RLock()
        self._entries: list[_Entry] = []

    @contextmanager
    def acquire(self, check: Check, group: Hashable = None) -> Iterator[Turn]:
        """Context manager that waits for the resource and holds it.

        Args:
            check: called every 0.1 s while waiting; may raise to give up.
            group: holders at the same time have equal groups.
        """
        with self._entered(group) as entry:
            entry.wait(check)
            yield Turn(self, entry)

    @contextmanager
    def acquire_next(self) -> Iterator[Turn]:
        """Context manager that waits for the resource, before all others, and holds it.

        For short work that must not be given up.
        """
        with self._entered(None) as entry:
            self.move_forward(entry)
            entry.acquired.wait()
            yield Turn(self, entry)

    @property
    def crowded(self) -> bool:
        """Whether any thread is waiting."""
        with self._lock:
            return self._holders() < len(self._entries)

    @property
    def length(self) -> int:
        """The number of threads that hold the resource or wait for it."""
        with self._lock:
            return len(self._entries)

    def admit(self) -> None:
        """Admits every thread at the head of the queue that may hold the resource."""
        with self._lock:
            for entry in self._entries[: self._at_once]:
                if entry.group != self._entries[0].group:
                    break
                entry.acquired.set()

    def move_back(self, entry: _Entry) -> None:
        """Moves a holder to the end of the queue, where it waits again."""
        with self._lock:
            entry.acquired.clear()
            self._entries.remove(entry)
            self._entries.append(entry)
            self.admit()

    def move_forward(self, entry: _Entry) -> None:
        """Moves a waiting thread in front of all others that wait. Does nothing to a holder."""
        with self._lock:
            if not entry.acquired.is_set():
                self._entries.remove(entry)
                self._entries.insert(self._holders(), entry)
                self.admit()

    @contextmanager
    def _entered(self, group: Hashable) -> Iterator[_Entry]:
        """Context manager that adds a thread to the queue, and removes it at the end, also after an error."""
        entry = _Entry(group)
        with self._lock:
            self._entries.append(entry)
            self.admit()
        try:
            yield entry
        finally:
            with self._lock:
                self._entries.remove(entry)
                self.admit()

    def _holders(self) -> int:
        """Returns how many threads hold the resource."""
        return sum(entry.acquired.is_set() for entry in self._entries)
