"""Turns in the order of asking, for threads that must stay cancellable while they wait."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

POLL_S = 0.1


class Turns:
    """At most `at_once` holders; the rest queue, and none overtakes."""

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._lock = threading.Lock()
        self._queue: list[threading.Event] = []

    @contextmanager
    def taken(self, waiting: Callable[[], None]) -> Iterator[None]:
        """Holds a turn. `waiting` is called every 0.1 s until it comes, and may raise to give up."""
        ticket = threading.Event()
        self._change(self._queue.append, ticket)
        try:
            while not ticket.wait(POLL_S):
                waiting()
            yield
        finally:
            self._change(self._queue.remove, ticket)

    def _change(self, change: Callable[[threading.Event], None], ticket: threading.Event) -> None:
        with self._lock:
            change(ticket)
            for served in self._queue[: self._at_once]:
                served.set()
