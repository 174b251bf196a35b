"""The two callbacks of all long work. One reports progress; both may raise to end the request."""

from collections.abc import Callable

Tick = Callable[[int, int], None]
"""Called as `tick(done, total)` at least every 0.25 s of work; may raise to end the request."""
Check = Callable[[], None]
"""Called at least every 0.25 s of work or of waiting that has no progress to report; may raise to end the
request."""
CHECK_S = 0.1
"""How often a thread that only waits calls its check or tick."""


def no_tick(done: int, total: int) -> None:
    """A tick that reports nothing and never raises."""


def no_check() -> None:
    """A check that never raises."""
