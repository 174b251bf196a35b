"""Whether a step takes longer the further it is, beyond what reading the longer cache costs."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

EARLY_STEP = 100
AROUND = 3
"""Chunks that are looked at in either place: one alone is at the mercy of whatever else runs."""


@dataclass(frozen=True)
class Growth:
    early_step: int
    late_step: int
    early_s: float
    """Of one step."""
    late_s: float
    cache_s: float
    """What reading the positions in between takes, at the speed of a copy."""

    @property
    def ratio(self) -> float:
        return self.late_s / self.early_s

    @property
    def ratio_beyond_cache(self) -> float:
        """1: nothing grows but the cache."""
        return (self.late_s - self.cache_s) / self.early_s


def growth(runs: Sequence[Sequence[float]], steps: int, position_s: float) -> Growth | None:
    """
    Args:
        runs: of each decode the seconds of its chunks, one after the other
        steps: of a chunk
        position_s: what reading one position of the cache takes

    Returns:
        None where the end is not clear of the beginning.
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
