"""The service with tiny checkpoints, on servers that tests share, and what their tests share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from server import CogServer


@pytest.fixture(scope="session")
def server(weights: Path) -> Iterator[CogServer]:
    """The service. `finetuned` is the tiny melody model; the base models are `small` and `melody`."""
    with CogServer(
        COG_WEIGHTS=str(weights / "melody"),
        MUSICGEN_WEIGHTS_DIR=str(weights),
        MUSICGEN_OUTPUT_GRACE_S="0.5",
        OMP_NUM_THREADS="1",
    ) as running:
        assert running.health()["status"] == "READY", running.log
        yield running


@pytest.fixture(scope="session")
def four(weights: Path) -> Iterator[CogServer]:
    """The same with four slots, and room for 240 requests that wait for one.

    200 of them are used at once. Cog may have lost some of the others: it can lose a place when a client
    cancels or hangs up, which several tests do.
    """
    with CogServer(
        COG_WEIGHTS=str(weights / "melody"),
        MUSICGEN_WEIGHTS_DIR=str(weights),
        OMP_NUM_THREADS="1",
        COG_MAX_CONCURRENCY="",
        MUSICGEN_SLOTS="4",
        MUSICGEN_WAITING="240",
    ) as running:
        assert running.health()["status"] == "READY", running.log
        yield running


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    """The folder of the server's temporary files."""
    (tmp_path / "temporary").mkdir()
    return tmp_path / "temporary"
