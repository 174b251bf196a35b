"""Judges from outside whether a Cog server still serves, and how often it may be restarted."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SILENT_S = 15.0
"""How long a server may give no answer, or its worker may not: longer than a busy machine needs."""
UNWELL_S = 3.0
"""How long a server may say that it is unwell for another reason, such as a dead worker."""
IDLE_BUSY_S = 30.0
"""How long a server may say BUSY while no prediction runs."""
INPUT_S = 600.0
"""How long all places may wait for input files at once: Cog sets no limit to that."""

BACK_OFF_S = 1.0
LONGEST_BACK_OFF_S = 60.0
WELL_S = 600.0
"""After that long without a fault the next restart does not wait."""
RATION_S = 300.0
LONGEST_RATION_S = 3600.0
"""Lost places cause a restart at most so often: a client may lose them on purpose."""

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Fault:
    """Why a Cog server must be restarted."""

    reason: str
    """One sentence without a full stop."""
    drain: bool = False
    """Whether predictions still run, and are worth waiting for."""


@dataclass(frozen=True)
class Observation:
    """What is known of a Cog server at one time."""

    health: Json | None
    """Its health check; None: no answer."""
    places: int
    lost: int
    """Places that will never take a prediction again."""
    running: Mapping[str, bool]
    """Predictions that Cog has started and not ended, and whether the service has begun with each."""


class Watch:
    """One Cog server over time."""

    def __init__(self) -> None:
        self._since_s: dict[str, float] = {}

    def fault(self, now_s: float, seen: Observation) -> Fault | None:
        """Takes in an observation.

        Args:
            now_s: a monotonic clock's time.
            seen: what was observed.

        Returns:
            Fault: what has gone on for too long, if anything has.
        """
        health = seen.health or {}
        status, error = health.get("status"), str(health.get("user_healthcheck_error") or "")
        unwell = status in ("UNHEALTHY", "DEFUNCT")
        slow = unwell and "timed out" in error
        busy = status == "BUSY"
        reason = f"its health is {status}" + (f" ({error.rstrip('.')})" if error else "")
        conditions = (
            ("silent", seen.health is None, SILENT_S, Fault("it does not answer")),
            ("slow", slow, SILENT_S, Fault(reason)),
            ("unwell", unwell and not slow, UNWELL_S, Fault(reason)),
            ("idle", busy and not seen.running, IDLE_BUSY_S, Fault("it says BUSY, but nothing runs")),
            (
                "input", busy and bool(seen.running) and not any(seen.running.values()), INPUT_S,
                Fault("every place waits for an input file that does not arrive"),
            ),
            (
                "lost", seen.places - seen.lost < (seen.places + 1) // 2, 0.0,
                Fault(f"{seen.lost} of its {seen.places} places are lost", drain=True),
            ),
        )  # fmt: skip
        for name, holds, limit_s, fault in conditions:
            if not holds:
                self._since_s.pop(name, None)
            elif now_s - self._since_s.setdefault(name, now_s) >= limit_s:
                return fault
        return None


class Restarts:
    """How long to wait before the next restart: longer each time, so that the cure is not the next fault."""

    def __init__(self) -> None:
        self._back_off_s = self._last_s = 0.0
        self._ration_s = RATION_S
        self._allowed_s = 0.0

    def delay_s(self, now_s: float, fault: Fault) -> float:
        """Seconds from `now_s` until the restart for this fault. It counts as done then."""
        if fault.drain:
            if now_s > self._allowed_s + LONGEST_RATION_S:
                self._ration_s = RATION_S
            start_s = max(now_s, self._allowed_s)
            self._allowed_s = start_s + self._ration_s
            self._ration_s = min(2 * self._ration_s, LONGEST_RATION_S)
            return start_s - now_s
        if now_s - self._last_s > WELL_S:
            self._back_off_s = 0.0
        delay_s = self._back_off_s
        self._back_off_s = min(max(2 * self._back_off_s, BACK_OFF_S), LONGEST_BACK_OFF_S)
        self._last_s = now_s + delay_s
        return delay_s
