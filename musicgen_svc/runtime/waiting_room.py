"""The queue of requests that wait for a slot. It runs on the event loop, so a waiting request uses no thread.

Requests of one group share the slots, and requests of different groups never run at the same time: a group is
a language model, of which only one generates at a time. A request without a group runs beside any.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

POLL_S = 0.5
"""How often a waiting request calls `on_wait`."""
OVERTAKING_PER_SLOT = 2
"""How many later requests per slot, of the group that runs, may be admitted before one of another group.

With 0 most slots would stay empty whenever requests for two models alternate."""


@dataclass(eq=False)
class _Entry:
    """A request that waits or runs."""

    group: Hashable
    admitted: "asyncio.Future[None]"
    overtaken: int = field(default=0, init=False)
    """How many later requests were admitted before it."""


class WaitingRoom:
    """Admits at most `slots` requests at once: of each group in the order of arrival.

    No group waits for ever. All methods must be called on one event loop.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._waiting: list[_Entry] = []
        self._running: list[_Entry] = []

    @property
    def waiting(self) -> int:
        """The number of requests that wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """The number of requests that were admitted and have not ended."""
        return len(self._running)

    @asynccontextmanager
    async def slot(self, group: Hashable, on_wait: Callable[[int], None]) -> AsyncIterator[None]:
        """Context manager that waits for a slot and holds it.

        Args:
            group: holders of slots at the same time have equal groups, or None.
            on_wait: called every 0.5 s while the request waits, with the number of requests that wait before
                it; may raise to give up. It is not called if there is a free slot.
        """
        request = _Entry(group, asyncio.get_running_loop().create_future())
        self._waiting.append(request)
        self._admit()
        try:
            while not request.admitted.done():
                on_wait(self._waiting.index(request))
                await asyncio.wait([request.admitted], timeout=POLL_S)
            yield
        finally:
            (self._running if request.admitted.done() else self._waiting).remove(request)
            self._admit()

    def _admit(self) -> None:
        """Admits every request that may run now."""
        most = OVERTAKING_PER_SLOT * self.slots
        passed: list[_Entry] = []
        for request in list(self._waiting):
            if len(self._running) == self.slots:
                return
            group = self._running_group()
            fits = request.group is None or group is None or request.group == group
            if fits and (request.group is None or all(earlier.overtaken < most for earlier in passed)):
                self._waiting.remove(request)
                self._running.append(request)
                request.admitted.set_result(None)
                if request.group is not None:
                    for earlier in passed:
                        earlier.overtaken += 1
            else:
                passed.append(request)

    def _running_group(self) -> Hashable:
        """Returns the group of those that run; None if none of them has a group."""
        return next((request.group for request in self._running if request.group is not None), None)
