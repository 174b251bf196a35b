"""How many threads PyTorch computes with on a CPU, a function of the model and the machine alone.

Another number of threads adds numbers in another order, so the number must not depend on the load, or the
same request would give other bytes. A small model is fastest with one thread. With more, its threads spend
their time on waiting for each other, and far more so when another process uses the same cores.

PyTorch keeps the number for each thread that computes, so each request sets its own number on its own thread.
"""

from functools import cache

import torch

from musicgen_svc.runtime.machine import cores

SMALL_PARAMETERS = 16_000_000
"""A model with fewer parameters computes with one thread. The smallest released MusicGen has 420 million."""


class ComputeThreads:
    """Chooses numbers of threads."""

    def __init__(self, user_chose: bool) -> None:
        """`user_chose`: whether the user set OMP_NUM_THREADS; then every model computes with so many."""
        self._user_chose = user_chose
        self.most = _default() if user_chose else min(_default(), cores())
        """The number for a large model, and for loading."""

    def for_model(self, parameters: int) -> int:
        """Returns the number of threads for a model with so many parameters."""
        return 1 if parameters < SMALL_PARAMETERS and not self._user_chose else self.most

    def fix(self, count: int) -> None:
        """Makes every model that is loaded later compute with `count` threads."""
        self._user_chose, self.most = True, count


def use_threads(count: int) -> None:
    """Makes PyTorch compute with `count` threads when the calling thread computes."""
    # At its first computation a thread takes the number that any thread set last, even if it has set its own
    # number before. To ask for the number counts as a computation.
    torch.get_num_threads()
    torch.set_num_threads(count)


@cache
def _default() -> int:
    """Returns PyTorch's own number, as it was before any model set another one."""
    return torch.get_num_threads()
