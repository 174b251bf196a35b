"""Decides whether a Cog server still serves, and how long to wait before a restart."""

from collections.abc import Mapping
from dataclasses import dataclass

from musicgen_svc.runtime.json_object import Json

SILENT_S = 15.0
"""How long a server or its worker may give no answer. A busy machine needs less."""
UNHEALTHY_S = 3.0
"""How long a server may report that it is unhealthy for another reason, such as a dead worker."""
LOST_S = 3.0
"""How long most places must be lost while the server is well otherwise."""
IDLE_BUSY_S = 30.0
"""How long a server may report BUSY while no prediction runs."""
INPUT_S = 600.0
"""How long all of Cog's places may wait for input files at once. Cog has no limit of its own."""

BACK_OFF_S = 1.0
"""Wait before the second restart in a row; doubled each time up to LONGEST_BACK_OFF_S."""
LONGEST_BACK_OFF_S = 60.0
WELL_S = 600.0
"""After this time without a fault, the next restart does not wait."""
RATION_S = 300.0
LONGEST_RATION_S = 3600.0
"""Least time between restarts for lost places, doubled each time up to LONGEST_RATION_S. There is a limit
because a client can make Cog lose places on purpose."""


@dataclass(frozen=True)
class Fault:
    """Why a Cog server must be restarted."""

    reason: str
    """One sentence without a full stop."""
    serves: bool = False
    """Whether the server still serves, so that the restart waits for the predictions that run."""


@dataclass(frozen=True)
class Observation:
    """What is known about a Cog server at one moment."""

    health: Json | None
    """The answer of its health check. None: there is none."""
    places: int
    """Predictions that the server runs at once."""
    lost: int
    """Places that will never run a prediction again."""
    running: Mapping[str, bool]
    """Id of each prediction that Cog runs -> whether the service has begun with it."""


class Watch:
    """Watches one Cog server over time."""

    def __init__(self) -> None:
        self._since_s: dict[str, float] = {}

    def fault(self, now_s: float, seen: Observation) -> Fault | None:
        """Adds an observation.

        Args:
            now_s: a monotonic clock's time.
            seen: what was observed.

        Returns:
            Fault: a condition that has lasted for too long. None: there is none.
        """
        health = seen.health or {}
        status, error = health.get("status"), str(health.get("user_healthcheck_error") or "")
        unhealthy = status in ("UNHEALTHY", "DEFUNCT")
        slow = unhealthy and "timed out" in error
        busy = status == "BUSY"
        reason = f"its health is {status}" + (f" ({error.rstrip('.')})" if error else "")
        conditions = (
            ("silent", seen.health is None, SILENT_S, Fault("it does not answer")),
            ("slow", slow, SILENT_S, Fault(reason)),
            ("unhealthy", unhealthy and not slow, UNHEALTHY_S, Fault(reason)),
            ("idle", busy and not seen.running, IDLE_BUSY_S, Fault("it says BUSY, but nothing runs")),
            (
                "input", busy and bool(seen.running) and not any(seen.running.values()), INPUT_S,
                Fault("every place waits for an input file that does not arrive"),
            ),
            (
                # The end of a worker loses the places of all that ran; the health tells it a moment later.
                "lost", not unhealthy and seen.places - seen.lost < (seen.places + 1) // 2, LOST_S,
                Fault(f"{seen.lost} of its {seen.places} places for predictions are lost", serves=True),
            ),
        )  # fmt: skip
        for name, holds, limit_s, fault in conditions:
            if not holds:
                self._since_s.pop(name, None)
            elif now_s - self._since_s.setdefault(name, now_s) >= limit_s:
                return fault
        return None


class Restarts:
    """Decides how long to wait before a restart. The wait grows, because restarts interrupt the service."""

    def __init__(self) -> None:
        self._back_off_s = self._last_s = 0.0
        self._ration_s = RATION_S
        self._allowed_s = 0.0

    def delay_s(self, now_s: float, fault: Fault) -> float:
        """Returns the seconds from `now_s` until the restart for this fault, and counts it as done."""
        if fault.serves:
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
