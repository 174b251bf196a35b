"""A fair queue for threads that must stay cancellable while they wait.

It has three uses: the device, which one thread uses at a time and yields between pieces of its work; the
engine's slots; and MultiBand Diffusion, which one request uses at a time.
"""

import threading
import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

from musicgen_svc.runtime.ticks import Check

POLL_S = 0.1
"""How often a waiting thread calls `check`."""
TURN_S = 0.1
"""After how long a holder yields its turn if others wait, and if its work can be interrupted."""


class Turn:
    """One thread's position in the queue and, once acquired, its right to use the resource."""

    def __init__(self, queue: "FairQueue", group: Hashable) -> None:
        self.group = group
        self.acquired = threading.Event()
        self._queue = queue
        self._since_s = 0.0

    def wait(self, check: Check) -> None:
        """Blocks until the turn is acquired. Calls `check` every 0.1 s, which may raise to give up."""
        while not self.acquired.wait(POLL_S):
            check()
        self._since_s = time.monotonic()

    @property
    def over(self) -> bool:
        """Whether the turn has lasted `TURN_S` and other threads wait."""
        return time.monotonic() - self._since_s >= TURN_S and self._queue.crowded

    def yield_turn(self, check: Check) -> None:
        """Moves to the end of the queue, and returns when the turn has been acquired again.

        If `check` raises, this thread acquires the next turn before the error is raised on: the code that the
        error unwinds holds the resource, and may use it to clean up.
        """
        self._queue.move_back(self)
        try:
            self.wait(check)
        except BaseException:
            self._queue.move_forward(self)
            self.acquired.wait()
            raise

    def join_group(self, group: Hashable) -> None:
        """Moves the turn to another group, and admits the waiting threads that may now share the resource."""
        self.group = group
        self._queue.admit()


class FairQueue:
    """A queue that admits at most `at_once` holders at a time, all of one group, in order of arrival.

    The holders are at the head of the queue, and all of them belong to the group of the first one. A thread
    of another group waits until all threads before it have left, and every later thread waits behind it.
    """

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._lock = threading.RLock()
        self._turns: list[Turn] = []

    @contextmanager
    def acquire(self, check: Check, group: Hashable = None) -> Iterator[Turn]:
        """Context manager that waits for a turn and holds it.

        Args:
            check: called every 0.1 s while waiting; may raise to give up.
            group: holders at the same time have equal groups.
        """
        turn = Turn(self, group)
        with self._lock:
            self._turns.append(turn)
            self.admit()
        with self._leaving(turn):
            turn.wait(check)
            yield turn

    @contextmanager
    def acquire_next(self) -> Iterator[Turn]:
        """Context manager that waits for the next turn, before all others, and holds it.

        For short work that must not be given up.
        """
        turn = Turn(self, None)
        with self._lock:
            self._turns.append(turn)
            self.move_forward(turn)
        with self._leaving(turn):
            turn.acquired.wait()
            yield turn

    @property
    def crowded(self) -> bool:
        """Whether any thread is waiting."""
        with self._lock:
            return self._holders() < len(self._turns)

    @property
    def length(self) -> int:
        """The number of threads that hold a turn or wait for one."""
        with self._lock:
            return len(self._turns)

    def admit(self) -> None:
        """Admits every thread at the head of the queue that may hold a turn."""
        with self._lock:
            for turn in self._turns[: self._at_once]:
                if turn.group != self._turns[0].group:
                    break
                turn.acquired.set()

    def move_back(self, turn: Turn) -> None:
        """Moves a holder to the end of the queue, where it waits again."""
        with self._lock:
            turn.acquired.clear()
            self._turns.remove(turn)
            self._turns.append(turn)
            self.admit()

    def move_forward(self, turn: Turn) -> None:
        """Moves a waiting turn in front of all other waiting turns. Does nothing to a holder."""
        with self._lock:
            if not turn.acquired.is_set():
                self._turns.remove(turn)
                self._turns.insert(self._holders(), turn)
                self.admit()

    @contextmanager
    def _leaving(self, turn: Turn) -> Iterator[None]:
        """Context manager that removes the turn from the queue at the end, also after an error."""
        try:
            yield
        finally:
            with self._lock:
                self._turns.remove(turn)
                self.admit()

    def _holders(self) -> int:
        """Returns how many turns are acquired."""
        return sum(turn.acquired.is_set() for turn in self._turns)
