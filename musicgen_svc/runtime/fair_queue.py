"""A fair queue for threads that must stay cancellable while they wait.

It serves three purposes: the device, which one thread uses at a time and yields between pieces of its
work; the slots of the engine; and the language model, which all holders share that want the same one.
"""

import threading
import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

from musicgen_svc.runtime.ticks import Check

POLL_S = 0.1
"""How often a waiting thread looks whether it must give up."""
TURN_S = 0.1
"""How long a holder keeps its turn while others wait, if its work can be interrupted."""


class Turn:
    """One thread's position in the queue and, once it has been acquired, its turn."""

    def __init__(self, queue: "FairQueue", group: Hashable) -> None:
        self.group = group
        self.acquired = threading.Event()
        self._queue = queue
        self._since_s = 0.0

    def wait(self, check: Check) -> None:
        """Blocks until the turn has been acquired. `check` is called meanwhile, and may raise."""
        while not self.acquired.wait(POLL_S):
            check()
        self._since_s = time.monotonic()

    @property
    def over(self) -> bool:
        """Whether the turn has lasted its time and others wait."""
        return time.monotonic() - self._since_s >= TURN_S and self._queue.crowded

    def yield_turn(self, check: Check) -> None:
        """Moves to the end of the queue, and returns when the turn has been acquired again.

        If `check` raises, this thread gets the very next turn and the error comes out within it: what the
        error unwinds was begun in a turn and has to end in one.
        """
        self._queue.move_back(self)
        try:
            self.wait(check)
        except BaseException:
            self._queue.move_forward(self)
            self.acquired.wait()
            raise

    def join_group(self, group: Hashable) -> None:
        """Belongs to this group from now on: those of the group that are next in the queue need not wait."""
        self.group = group
        self._queue.admit()


class FairQueue:
    """Admits at most `at_once` holders, all of one group, in the order in which they asked.

    The holders are the head of the queue, as far as it is of the first one's group. A thread of another group
    waits until all before it have left, and every thread that comes later waits behind it.
    """

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._lock = threading.RLock()
        self._turns: list[Turn] = []

    @contextmanager
    def acquire(self, check: Check, group: Hashable = None) -> Iterator[Turn]:
        """Holds a turn. `check` is called every 0.1 s until it comes, and may raise to give up."""
        turn = Turn(self, group)
        with self._lock:
            self._turns.append(turn)
            self.admit()
        with self._leaving(turn):
            turn.wait(check)
            yield turn

    @contextmanager
    def acquire_next(self) -> Iterator[Turn]:
        """Holds the very next turn, for what takes no time and cannot be given up."""
        turn = Turn(self, None)
        with self._lock:
            self._turns.append(turn)
            self.move_forward(turn)
        with self._leaving(turn):
            turn.acquired.wait()
            yield turn

    @property
    def crowded(self) -> bool:
        """Whether any thread waits."""
        with self._lock:
            return self._holders() < len(self._turns)

    @property
    def length(self) -> int:
        """How many threads hold a turn or wait for one."""
        with self._lock:
            return len(self._turns)

    def admit(self) -> None:
        """Gives a turn to every thread at the head of the queue that may have one."""
        with self._lock:
            for turn in self._turns[: self._at_once]:
                if turn.group != self._turns[0].group:
                    break
                turn.acquired.set()

    def move_back(self, turn: Turn) -> None:
        """Makes a holder wait again, behind all others."""
        with self._lock:
            turn.acquired.clear()
            self._turns.remove(turn)
            self._turns.append(turn)
            self.admit()

    def move_forward(self, turn: Turn) -> None:
        """Moves a waiting turn before all others that wait."""
        with self._lock:
            if not turn.acquired.is_set():
                self._turns.remove(turn)
                self._turns.insert(self._holders(), turn)
                self.admit()

    @contextmanager
    def _leaving(self, turn: Turn) -> Iterator[None]:
        """Removes the turn from the queue at the end, however that comes."""
        try:
            yield
        finally:
            with self._lock:
                self._turns.remove(turn)
                self.admit()

    def _holders(self) -> int:
        return sum(turn.acquired.is_set() for turn in self._turns)
