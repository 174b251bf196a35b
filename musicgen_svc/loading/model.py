"""A language model with everything that it needs to generate."""

from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from musicgen_svc.engine.engine import Engine
from musicgen_svc.models.conditioners import Conditioner
from musicgen_svc.models.encodec import Codec


@dataclass(frozen=True)
class Model:
    """A checkpoint, ready to generate."""

    name: str
    path: Path
    """The file or folder that it was loaded from."""
    format: str
    window_s: float
    """The length of audio that it was trained on, in seconds."""
    conditioner: Conditioner
    engine: Engine
    codec: Codec
    threads: int
    """With how many threads a CPU computes its requests, see `runtime/threads.py`."""
    hash: Future[str]
    """What `content_hash` waits for."""

    @property
    def window(self) -> int:
        """The length of audio that it was trained on, in frames of the codec."""
        return int(self.window_s * self.codec.frame_rate)

    @property
    def content_hash(self) -> str:
        """The sha256 of the language model's file or files. It is ready some seconds after loading."""
        return self.hash.result()
