"""The one callback through which all long work reports, and through which it is stopped."""

from collections.abc import Callable

Tick = Callable[[int, int], None]
"""Called as `tick(done, total)` at least every 0.25 s of work; may raise to end the request."""


def no_tick(done: int, total: int) -> None:
    """Reports to nobody."""
