"""What the tests of reading audio share."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from musicgen_svc.audio.reading import read_clip

RATE = 32_000


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., torch.Tensor]:
    """Reads bytes from a file without a suffix, as Cog may write it."""

    def from_bytes(content: bytes, **options: object) -> torch.Tensor:
        path = tmp_path / "clip"
        path.write_bytes(content)
        return read_clip(path, **({"sample_rate": RATE, "channels": 1} | options))

    return from_bytes
