"""Third parties draw from Python's and torch's global generators: pinned and restored around them."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class GlobalRandom:
    """The global generators as one request sees them.

    Inside `pinned()` they continue this request's own streams; outside they are as they were. What
    one request draws therefore depends on its seed alone, whatever ran before or runs between.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._device = device
        with self._restored():
            random.seed(seed)
            torch.manual_seed(seed)
            self._keep()

    @contextmanager
    def pinned(self) -> Iterator[None]:
        with self._restored():
            random.setstate(self._python)
            torch.set_rng_state(self._torch)
            if self._device.type == "cuda":
                torch.cuda.set_rng_state(self._cuda, self._device)
            try:
                yield
            finally:
                self._keep()

    def _keep(self) -> None:
        self._python = random.getstate()
        self._torch = torch.get_rng_state()
        if self._device.type == "cuda":
            self._cuda = torch.cuda.get_rng_state(self._device)

    @contextmanager
    def _restored(self) -> Iterator[None]:
        python = random.getstate()
        try:
            with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
                yield
        finally:
            random.setstate(python)
