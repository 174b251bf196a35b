"""Measures whether late steps take longer than early ones, beyond the cost of reading a longer cache."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

EARLY_STEP = 100
AROUND = 3
"""Chunks whose median is taken early and late, because other processes may disturb a single one."""


@dataclass(frozen=True)
class Growth:
    """The time of an early and of a late step."""

    early_step: int
    late_step: int
    early_s: float
    late_s: float
    cache_s: float
    """Time to read the cache's positions in between, at the speed of a copy."""

    @property
    def ratio(self) -> float:
        """Time of the late step over that of the early one."""
        return self.late_s / self.early_s

    @property
    def ratio_beyond_cache(self) -> float:
        """The same ratio without the time to read the longer cache. 1: nothing else grows."""
        return (self.late_s - self.cache_s) / self.early_s


def growth(runs: Sequence[Sequence[float]], steps: int, position_s: float) -> Growth | None:
    """Compares the time of early and late steps.

    Args:
        runs: seconds of each chunk, for each decode.
        steps: number of steps in a chunk.
        position_s: time to read one position of the cache.

    Returns:
        Growth: None if the runs are too short to tell early from late.
    """
    chunks = min(len(run) for run in runs)
    first, last = EARLY_STEP // steps - AROUND // 2, chunks - AROUND
    if last < first + AROUND:
        return None
    early, late = (
        statistics.median(run[at + i] for run in runs for i in range(AROUND)) / steps for at in (first, last)
    )
    middle = AROUND * steps // 2
    return Growth(
        early_step=first * steps + middle,
        late_step=last * steps + middle,
        early_s=early,
        late_s=late,
        cache_s=(last - first) * steps * position_s,
    )
