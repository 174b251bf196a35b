"""Pins the global random generators of Python and torch around code that draws from them.

Demucs and audiocraft's diffusion draw from these generators and take no generator as an argument.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class _Streams:
    """The states of the three global generators."""

    python: tuple[Any, ...]
    cpu: torch.Tensor
    cuda: torch.Tensor | None


class GlobalRandom:
    """The random streams of one request, for code that draws from the global generators.

    Inside `pinned()` the global generators continue the request's own streams; at its end they get back the
    states that they had before. What a request draws therefore depends on its seed alone, and not on what
    runs before it or in between.

    The generators belong to the process, so only one thread at a time may be inside `pinned()`. A thread that
    yields the device inside it does so within `unpinned()`.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        """Seeds the request's streams, as `random.seed` and `torch.manual_seed` would.

        Args:
            seed: of all three streams.
            device: the GPU whose generator is pinned too, or a CPU.
        """
        self._device = device
        self._own = _Streams(
            random.Random(seed).getstate(),
            torch.Generator().manual_seed(seed).get_state(),
            torch.Generator(device).manual_seed(seed).get_state() if device.type == "cuda" else None,
        )
        self._outside: _Streams | None = None

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """Context manager in which the global generators continue the request's streams."""
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
        """Context manager in which the global generators have the states from before `pinned()`.

        Does nothing outside of `pinned()`.
        """
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
        """Returns the states of the global generators."""
        return _Streams(
            random.getstate(),
            torch.get_rng_state(),
            torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None,
        )

    def _set(self, streams: _Streams) -> None:
        """Sets the states of the global generators."""
        random.setstate(streams.python)
        torch.set_rng_state(streams.cpu)
        if streams.cuda is not None:
            torch.cuda.set_rng_state(streams.cuda, self._device)
