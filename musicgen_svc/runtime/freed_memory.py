"""Gives freed memory back to the operating system.

glibc keeps freed memory for the process, spread over the heaps of many threads. When many requests with large
inputs arrive at once, Cog parses each of them as JSON, in a thread of its own. Without this module the memory
for that would stay with the process, although the inputs lie on disk by then.
"""

import ctypes
import time
from collections.abc import Callable

INTERVAL_S = 2.0


class FreedMemory:
    """Gives freed memory back at most every two seconds, because that takes some milliseconds."""

    def __init__(self) -> None:
        library = ctypes.CDLL(None)
        self._trim: Callable[[int], int] | None = getattr(library, "malloc_trim", None)  # glibc only
        self._last_s = 0.0

    def give_back(self) -> None:
        """Gives back what malloc keeps, unless that was done a moment ago. Does nothing without glibc."""
        now_s = time.monotonic()
        if self._trim is not None and now_s - self._last_s >= INTERVAL_S:
            self._last_s = now_s
            self._trim(0)
