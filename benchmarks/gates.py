"""What each model must reach on a GPU: the only table of it. The values are those of one H200."""

import re
from dataclasses import dataclass

from benchmarks.bounds import Bound

RATES = {"H200": 1.0, "H100": 0.7}
"""A word in a GPU's name -> how fast it must be, relative to an H200."""


@dataclass(frozen=True)
class Gates:
    """The gates of one model, for pieces of 30 s in fp16."""

    steps: float
    """Steps a second of one slot."""
    real_time: float
    """Seconds of audio a second of 16 slots together."""
    growth: float
    """Time of a step at the end of the piece, over that of step 100."""
    latency_s: dict[int, float]
    """Seconds of audio -> seconds from sending a request to having its file."""


GATES = {
    "small": Gates(1500, 180, 1.44, {8: 0.45, 30: 1.35}),
    "medium": Gates(550, 70, 1.31, {8: 1.0, 30: 3.1}),
    "large": Gates(420, 50, 1.25, {8: 1.25, 30: 4.0}),
}
RATIO = 10
"""Steps a second of one slot, over audiocraft's. It is not scaled, because the host limits audiocraft."""
STEPS_WITHOUT_KERNELS = 400
"""Steps a second of one slot of `small` where our own kernels do not work."""
FIRST = 1.2
"""Time of the first request after set-up, over that of later ones."""
SONGS = 22
"""Pieces of 24 in which the song that the prompt names is recognized. Random ones are wrong in nearly all."""


def rate(device_name: str) -> float | None:
    """How fast a GPU must be, relative to an H200. None: there are no gates for it."""
    return next((rate for word, rate in RATES.items() if re.search(rf"\b{word}\b", device_name)), None)


def decode_bounds(model: str, rate: float | None) -> list[str]:
    """Returns the options of `scripts/bench` for the gates of a model with 1 and 16 slots."""
    if rate is None:
        return []
    gates = GATES[model]
    return [
        *at_least(
            Bound("steps", gates.steps * rate, "1"),
            Bound("ratio", RATIO, "1"),
            Bound("real-time", gates.real_time * rate, "16"),
        ),
        *at_most(Bound("growth", gates.growth, "1")),
    ]


def without_kernels_bounds(rate: float | None) -> list[str]:
    """Returns the options of `scripts/bench` for the gates of `small` without our own kernels."""
    return [] if rate is None else at_least(Bound("steps", STEPS_WITHOUT_KERNELS * rate, "1"))


def latency_bounds(model: str, rate: float | None) -> list[str]:
    """Returns the options of `benchmarks.latency` for the gates of a model."""
    if rate is None:
        return []
    seconds = GATES[model].latency_s
    shortest = str(min(seconds))  # its first request is the first one after set-up
    bounds = [Bound("seconds", value / rate, str(length)) for length, value in seconds.items()]
    return at_most(*bounds, Bound("first", FIRST, shortest))


def at_least(*bounds: Bound) -> list[str]:
    """Returns the options that ask for values of at least these bounds."""
    return [word for bound in bounds for word in ("--at-least", bound.option())]


def at_most(*bounds: Bound) -> list[str]:
    """Returns the options that ask for values of at most these bounds."""
    return [word for bound in bounds for word in ("--at-most", bound.option())]
