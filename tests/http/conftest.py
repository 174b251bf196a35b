"""Real Cog servers over the tiny checkpoints, started once and shared."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from server import CogServer


@pytest.fixture(scope="session")
def server(weights: Path) -> Iterator[CogServer]:
    """`finetuned` is the tiny melody model; of the base models `small` and `melody` are present."""
    with CogServer(
        COG_WEIGHTS=str(weights / "melody"),
        MUSICGEN_WEIGHTS_DIR=str(weights),
        MUSICGEN_OUTPUT_GRACE_S="0.5",
        OMP_NUM_THREADS="1",
    ) as running:
        assert running.health()["status"] == "READY", running.log
        yield running
