"""Records a function as CUDA graphs, one for each key, and replays them. No other module has CUDA-graph code.

The memory that the function reads and writes must keep its addresses, and nothing in the function may wait
for the device. All recordings share the memory of their intermediate results, because no intermediate result
is used after a replay.

Any thread may replay a recording, if only one thread does so at a time. To record, a thread must set the
current device and the capturing stream, because both belong to a thread. While one thread records, other
threads may enqueue small work of their own on the default stream: PyTorch allocates memory by stream, and the
capture checks the operations of its own thread only.
"""

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch

WARM_UP_CALLS = 2
"""Calls before the recording, in which libraries choose their kernels and allocate their workspaces."""


class Graphed[Key: Hashable]:
    """Replays `function(key)` as one launch on a GPU, and calls it on any other device."""

    def __init__(
        self, function: Callable[[Key], None], device: torch.device, *, enabled: bool = True
    ) -> None:
        """Makes a callable that has no recordings yet.

        Args:
            function: what is recorded.
            device: where it computes.
            enabled: whether to record at all. If not, the function is called, and launches its operations one
                by one.
        """
        self._function = function
        self._device = device
        self._graphs: dict[Key, torch.cuda.CUDAGraph] = {}
        # Only one stream, because libraries allocate a workspace for each.
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None
        self.enabled = enabled and device.type == "cuda"

    @property
    def recordings(self) -> Mapping[Key, torch.cuda.CUDAGraph]:
        """The graphs that have been recorded, by key."""
        return self._graphs

    def __call__(self, key: Key, dry_run: Callable[[Callable[[], None]], None]) -> None:
        """Computes `function(key)`.

        Args:
            key: the function's argument. A new key is recorded first.
            dry_run: makes a call such that the function changes nothing that is read later. A new key is
                recorded in `dry_run`, because the recording calls the function to warm up.
        """
        if not self.enabled:
            self._function(key)
            return
        if key not in self._graphs:
            dry_run(lambda: self._record(key))
        self._graphs[key].replay()

    def forget(self) -> None:
        """Drops all recordings. Must be called before the memory that they read and write is replaced."""
        self._graphs.clear()
        self._pool = None  # is freed with the last graph in it

    def _record(self, key: Key) -> None:
        """Records the graph of a key on a stream of its own."""
        with torch.cuda.device(self._device):  # a new thread starts with the first device
            stream = self._stream = self._stream or torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.stream(stream):  # also restores the stream if the recording fails
                for _ in range(WARM_UP_CALLS):
                    self._function(key)
                # Waits for the device at its start, and so for the warm-up.
                with torch.cuda.graph(
                    graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"
                ):
                    self._function(key)
            self._pool = graph.pool()
            self._graphs[key] = graph
