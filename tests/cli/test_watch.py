"""When a Cog server no longer serves, and how soon it is restarted."""

from typing import Any

import pytest

from musicgen_svc.cli.watch import (
    IDLE_BUSY_S,
    INPUT_S,
    LONGEST_BACK_OFF_S,
    LONGEST_RATION_S,
    LOST_S,
    RATION_S,
    SILENT_S,
    UNHEALTHY_S,
    WELL_S,
    Fault,
    Observation,
    Restarts,
    Watch,
)  # fmt: skip

READY = {"status": "READY"}
BUSY = {"status": "BUSY"}
DEAD = {"status": "UNHEALTHY", "user_healthcheck_error": "Healthcheck error: healthcheck channel closed"}
SLOW = {"status": "UNHEALTHY", "user_healthcheck_error": "healthcheck timed out"}


def seen(health: Any, lost: int = 0, places: int = 4, **running: bool) -> Observation:
    return Observation(health, places, lost, running)


@pytest.mark.parametrize(
    ("observation", "limit_s", "reason"),
    [
        (seen(None), SILENT_S, "it does not answer"),
        (seen(SLOW), SILENT_S, "its health is UNHEALTHY (healthcheck timed out)"),
        (seen(DEAD), UNHEALTHY_S, "channel closed)"),
        (seen({"status": "DEFUNCT"}), UNHEALTHY_S, "its health is DEFUNCT"),
        (seen(BUSY), IDLE_BUSY_S, "nothing runs"),
        (seen(BUSY, a=False, b=False), INPUT_S, "input file"),
        (seen(READY, lost=3), LOST_S, "3 of its 4 places for predictions are lost"),
        (seen(READY, lost=1, places=1), LOST_S, "1 of its 1 places for predictions are lost"),
    ],
)
def test_a_fault_is_what_lasts_and_an_interruption_starts_anew(
    observation: Observation, limit_s: float, reason: str
) -> None:
    watch = Watch()
    assert watch.fault(0.0, observation) is None
    assert watch.fault(limit_s - 0.1, observation) is None
    assert watch.fault(limit_s, seen(READY)) is None
    assert watch.fault(limit_s + 1, observation) is None
    fault = watch.fault(2 * limit_s + 1, observation)
    assert fault is not None and reason in fault.reason


@pytest.mark.parametrize(
    "observation",
    [
        seen(READY), seen(BUSY, a=True, b=False), seen(READY, lost=2), seen(READY, lost=0, places=1),
        seen({"status": "STARTING"}),
    ],
)  # fmt: skip
def test_what_still_serves_is_left_alone(observation: Observation) -> None:
    watch = Watch()
    assert all(watch.fault(float(hour) * 3600, observation) is None for hour in range(24))


def test_a_dead_worker_with_which_all_places_are_lost_is_no_matter_of_places() -> None:
    """A restart for lost places waits for what runs, and comes at most every five minutes."""
    watch = Watch()
    assert watch.fault(0.0, seen(READY, lost=4, a=True)) is None  # Cog has not noticed the death yet
    assert watch.fault(1.0, seen(DEAD, lost=4, a=True)) is None
    fault = watch.fault(1.0 + UNHEALTHY_S, seen(DEAD, lost=4, a=True))
    assert fault is not None and not fault.serves and "UNHEALTHY" in fault.reason


def test_a_crash_is_restarted_at_once_and_one_after_the_other_ever_later() -> None:
    restarts, now_s, delays = Restarts(), 10_000.0, []
    for _ in range(9):
        delays.append(restarts.delay_s(now_s, Fault("it crashed")))
        now_s += delays[-1] + 20
    assert delays == [0, 1, 2, 4, 8, 16, 32, LONGEST_BACK_OFF_S, LONGEST_BACK_OFF_S]
    assert restarts.delay_s(now_s + WELL_S, Fault("it crashed")) == 0


def test_lost_places_restart_at_most_so_often() -> None:
    """Otherwise a client that makes Cog lose places on purpose could restart the server at any time."""
    restarts, now_s, lost = Restarts(), 10_000.0, Fault("places are lost", serves=True)
    gaps = []
    for _ in range(6):
        gaps.append(restarts.delay_s(now_s, lost))
        now_s += gaps[-1]
    assert gaps == [0, RATION_S, 2 * RATION_S, 4 * RATION_S, 8 * RATION_S, LONGEST_RATION_S]
    assert restarts.delay_s(now_s + 2 * LONGEST_RATION_S + 1, lost) == 0
    assert restarts.delay_s(now_s + 2 * LONGEST_RATION_S + 1, lost) == RATION_S
