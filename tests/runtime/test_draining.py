"""A service refuses requests while its drain file exists, and starts without an old one."""

from pathlib import Path

import pytest

from musicgen_svc.errors import DrainingError
from musicgen_svc.runtime.draining import Drain


def test_requests_are_refused_while_the_file_exists(tmp_path: Path) -> None:
    file = tmp_path / "drain"
    drain = Drain(file)
    drain.check()
    file.touch()
    with pytest.raises(DrainingError, match="send the request again later, or to another server"):
        drain.check()


def test_the_file_of_an_earlier_server_is_removed(tmp_path: Path) -> None:
    """A container that is restarted in its pod keeps its volumes, and with them the file."""
    (tmp_path / "drain").touch()
    Drain(tmp_path / "drain").check()
    assert not (tmp_path / "drain").exists()


def test_a_service_without_a_file_is_never_drained() -> None:
    Drain(None).check()
