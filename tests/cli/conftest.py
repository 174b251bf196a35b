"""A server that answers like Cog's, and a client of it."""

import threading
from collections.abc import Iterator

import pytest

from musicgen_svc.cli.client import Client
from tests.cli.fake_cog import FakeCog


@pytest.fixture
def cog() -> Iterator[FakeCog]:
    """A server that answers like Cog's."""
    with FakeCog() as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def client(cog: FakeCog) -> Client:
    """A client of that server."""
    return Client(cog.url)
