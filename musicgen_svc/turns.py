"""Turns in the order of asking, for threads that must stay cancellable while they wait.

One kind of queue serves three ends: the device, which one thread uses at a time and hands on between
pieces of its work; the places in the engine; and the language model, which all share that want the same.
"""

import threading
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

POLL_S = 0.1

TURN_S = 0.1
"""After which a turn is passed on, if others wait and its work can be laid aside."""


class Turn:
    """A thread's place in the queue and, once it is served, its turn."""

    def __init__(self, turns: "Turns", kind: Hashable) -> None:
        self.kind = kind
        self.served = threading.Event()
        self._turns = turns
        self._since_s = 0.0

    def wait(self, waiting: Callable[[], None]) -> None:
        while not self.served.wait(POLL_S):
            waiting()
        self._since_s = time.monotonic()

    @property
    def over(self) -> bool:
        """Whether it has lasted its time, and others wait."""
        return time.monotonic() - self._since_s >= TURN_S and self._turns.crowded

    def pass_on(self, waiting: Callable[[], None]) -> None:
        """Goes to the end of the queue, and returns when its turn has come again.

        What `waiting` raises comes out within a turn, the very next one: what it unwinds was begun
        in a turn and has to end in one.
        """
        self._turns.move_back(self)
        try:
            self.wait(waiting)
        except BaseException:
            self._turns.move_forward(self)
            self.served.wait()
            raise

    def share(self, kind: Hashable) -> None:
        """Is of this kind from now on: those of it that come next need wait no more."""
        self.kind = kind
        self._turns.serve()


class Turns:
    """At most `at_once` holders, all of one kind. The rest queue, and none overtakes.

    The holders are the head of the queue, as far as it is of the first one's kind: whoever is of
    another kind waits until all before it have gone, and everybody who comes later waits behind it.
    """

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._lock = threading.RLock()
        self._queue: list[Turn] = []

    @contextmanager
    def taken(self, waiting: Callable[[], None], kind: Hashable = None) -> Iterator[Turn]:
        """Holds a turn. `waiting` is called every 0.1 s until it comes, and may raise to give up."""
        turn = Turn(self, kind)
        with self._lock:
            self._queue.append(turn)
            self.serve()
        with self._until_left(turn):
            turn.wait(waiting)
            yield turn

    @contextmanager
    def taken_next(self) -> Iterator[Turn]:
        """Holds the very next turn, for what takes no time and cannot be given up."""
        turn = Turn(self, None)
        with self._lock:
            self._queue.append(turn)
            self.move_forward(turn)
        with self._until_left(turn):
            turn.served.wait()
            yield turn

    @property
    def crowded(self) -> bool:
        """Whether anybody waits."""
        with self._lock:
            return self._holders() < len(self._queue)

    def serve(self) -> None:
        with self._lock:
            for turn in self._queue[: self._at_once]:
                if turn.kind != self._queue[0].kind:
                    break
                turn.served.set()

    def move_back(self, turn: Turn) -> None:
        """A holder waits again, behind all others."""
        with self._lock:
            turn.served.clear()
            self._queue.remove(turn)
            self._queue.append(turn)
            self.serve()

    def move_forward(self, turn: Turn) -> None:
        """One that waits comes before the others that do."""
        with self._lock:
            if not turn.served.is_set():
                self._queue.remove(turn)
                self._queue.insert(self._holders(), turn)
                self.serve()

    @contextmanager
    def _until_left(self, turn: Turn) -> Iterator[None]:
        try:
            yield
        finally:
            with self._lock:
                self._queue.remove(turn)
                self.serve()

    def _holders(self) -> int:
        return sum(turn.served.is_set() for turn in self._queue)
