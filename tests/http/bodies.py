"""Inputs of requests that several tests send."""

from typing import Any

SHORT: dict[str, Any] = {"prompt": "a waltz", "duration": 1, "seed": 1}
"""Takes a moment."""
LONG: dict[str, Any] = {"prompt": "a waltz", "duration": 600, "seed": 1}
"""Takes longer than any test waits, so that it must be cancelled."""
