"""Servers that tests share: the service with tiny checkpoints, and a toy service."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import toy
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
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout whose service is a toy."""
    return toy.checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="module")
def toy_server(checkout: Path) -> Iterator[CogServer]:
    """A server of the toy service."""
    with CogServer(root=checkout) as running:
        yield running
