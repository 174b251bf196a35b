"""The toy service, on a server that tests share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import toy
from server import CogServer


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout whose service is a toy."""
    return toy.checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="session")
def toy_server(checkout: Path) -> Iterator[CogServer]:
    """A server of the toy service."""
    with CogServer(root=checkout) as running:
        yield running
