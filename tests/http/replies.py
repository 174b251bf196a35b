"""Makes files for requests, and reads replies."""

import base64
import io
import re
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile
from sounds import encode, tone

Samples = npt.NDArray[np.float32]


def data_uri(content: bytes, mime: str = "audio/wav") -> str:
    """A file as a data URI."""
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
    """Samples [C, T] and their rate in Hz, without the padding that an mp3's gapless header names."""
    content, rate = soundfile.read(io.BytesIO(output(reply)), dtype="float32", always_2d=True)
    return content.T, rate


def sentence(reply: dict[str, Any]) -> str:
    """The error of a reply that failed, which is one sentence."""
    assert reply["code"] == 200 and reply["status"] == "failed", reply
    return str(reply["error"])


def percentages(logs: str) -> list[int]:
    """The percentages that progress bars in a prediction's log show."""
    return [int(percent) for percent in re.findall(r"(\d+)%\|", logs)]
