"""Third parties draw from Python's and torch's global generators: pinned and restored around them."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class _Streams:
    """Where the three global generators stand."""

    python: tuple[Any, ...]
    cpu: torch.Tensor
    cuda: torch.Tensor | None


class GlobalRandom:
    """The global generators as one request sees them.

    Inside `pinned()` they continue this request's own streams; outside they are as they were. What
    one request draws therefore depends on its seed alone, whatever ran before or runs between.

    The generators are the process's, so that one thread at a time may be inside. It steps out with
    `unpinned()` where it lets another one go first.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._device = device
        self._own = _Streams(
            random.Random(seed).getstate(),
            torch.Generator().manual_seed(seed).get_state(),
            torch.Generator(device).manual_seed(seed).get_state() if device.type == "cuda" else None,
        )
        self._outside: _Streams | None = None

    @contextmanager
    def pinned(self) -> Iterator[None]:
        assert self._outside is None, "pinned twice"
        self._outside = self._now()
        self._set(self._own)
        try:
            yield
        finally:
            self._own = self._now()
            self._set(self._outside)
            self._outside = None

    @contextmanager
    def unpinned(self) -> Iterator[None]:
        """What another thread finds is what was there before `pinned()`; nothing, outside of it."""
        if self._outside is None:
            yield
            return
        inside = self._now()
        self._set(self._outside)
        try:
            yield
        finally:
            self._outside = self._now()
            self._set(inside)

    def _now(self) -> _Streams:
        return _Streams(
            random.getstate(),
            torch.get_rng_state(),
            torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None,
        )

    def _set(self, streams: _Streams) -> None:
        random.setstate(streams.python)
        torch.set_rng_state(streams.cpu)
        if streams.cuda is not None:
            torch.cuda.set_rng_state(streams.cuda, self._device)
