"""What goes into a request and what comes out of a reply."""

import base64
import io
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile
from sounds import encode, tone

Samples = npt.NDArray[np.float32]


def data_uri(content: bytes, mime: str = "audio/wav") -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def clip(
    seconds: float, *, channels: int = 1, rate: int = 32_000, hz: float = 330.0, kind: str = "wav16"
) -> str:
    """A tone as a data URI."""
    return data_uri(encode(tone(hz, seconds, rate, channels=channels), rate, kind))


def output(reply: dict[str, Any]) -> bytes:
    """The file in a reply that succeeded."""
    assert reply.get("status") == "succeeded", reply
    return base64.b64decode(reply["output"].split(",", 1)[1])


def samples(reply: dict[str, Any]) -> tuple[Samples, int]:
    """[C, T] and the rate, as libsndfile reads the file: for mp3 without what the gapless header cuts."""
    content, rate = soundfile.read(io.BytesIO(output(reply)), dtype="float32", always_2d=True)
    return content.T, rate


def sentence(reply: dict[str, Any]) -> str:
    """The one sentence of a reply that failed, as Cog gives it."""
    assert reply["code"] == 200 and reply["status"] == "failed", reply
    return str(reply["error"])
