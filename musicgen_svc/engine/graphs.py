"""The only CUDA-graph code: a function without arguments, recorded once per key and then replayed.

Recording and replaying is all this knows. What the function reads and writes must stay where it is
in memory, and nothing in it may wait for the host. What it only needs on the way lies in memory that
all recordings share, since nothing of it outlives a replay.

A recording belongs to no thread: any may replay it, if only one does so at a time. The recording
itself binds two things that do belong to a thread, the current device and the capturing stream, and
so it sets both. While one thread records, others may enqueue small work of their own on the default
stream: torch allocates by stream, and the capture watches its own thread only.
"""

from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)

WARM_UP_CALLS = 2
"""Before recording, so that libraries choose their kernels and allocate their workspaces outside of it."""


class Graphed(Generic[Key]):
    """`function(key)`, replayed as one launch where there is a GPU; called as it is elsewhere."""

    def __init__(
        self, function: Callable[[Key], None], device: torch.device, *, enabled: bool = True
    ) -> None:
        """`enabled=False` is the off switch: the same function, launched operation by operation."""
        self._function = function
        self._device = device
        self._graphs: dict[Key, torch.cuda.CUDAGraph] = {}
        self._stream: torch.cuda.Stream | None = None  # one: libraries keep a workspace for each
        self._pool: Any = None
        self.enabled = enabled and device.type == "cuda"

    def __call__(self, key: Key, rehearsal: Callable[[Callable[[], None]], None]) -> None:
        """Runs the function.

        `rehearsal(call)` calls `call` such that it leaves no trace; only used when `key` is new.
        """
        if not self.enabled:
            self._function(key)
            return
        if key not in self._graphs:
            rehearsal(lambda: self._record(key))
        self._graphs[key].replay()

    def forget(self) -> None:
        """Lets go of all recordings: what they read and write will be elsewhere."""
        self._graphs.clear()
        self._pool = None  # goes with the last graph in it

    def _record(self, key: Key) -> None:
        with torch.cuda.device(self._device):  # a thread begins with the first one
            beside = self._stream = self._stream or torch.cuda.Stream()  # type: ignore[no-untyped-call]
            beside.wait_stream(torch.cuda.current_stream())
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.stream(beside):  # to the end: a recording that fails does not leave its stream
                for _ in range(WARM_UP_CALLS):
                    self._function(key)
                # Begins by waiting for the device, and with it for the warm-up.
                with torch.cuda.graph(
                    graph, pool=self._pool, stream=beside, capture_error_mode="thread_local"
                ):
                    self._function(key)
            self._pool = graph.pool()
            self._graphs[key] = graph
