"""Fixtures for the tests of checkpoints."""

from pathlib import Path

import pytest


@pytest.fixture
def writable_weights(weights: Path, tmp_path: Path) -> Path:
    """The tiny weights as links in a folder of their own, so that archives can be unpacked beside them."""
    folder = tmp_path / "weights"
    folder.mkdir()
    for part in weights.iterdir():
        (folder / part.name).symlink_to(part)
    return folder
