"""Reads the event stream of a prediction, and the chunks of audio in it."""

import base64
import contextlib
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import requests
from server import CogServer, Json

EVENT_STREAM = {"Accept": "text/event-stream"}
LIVE = {"live": "1"}


class Event(NamedTuple):
    """One event: its name, and its data."""

    name: str
    data: Json

    @property
    def chunk(self) -> Json | None:
        """The chunk of audio in it, if it is one."""
        is_chunk = self.name == "metric" and self.data["name"] == "audio" and self.data["value"]
        return dict(self.data["value"]) if is_chunk else None


@contextlib.contextmanager
def events(
    server: CogServer, values: Json, id: str | None = None, accept: str = EVENT_STREAM["Accept"], **body: Any
) -> Iterator[Iterator[Event]]:
    """Context manager that starts a prediction, and yields its events while they come. Its end hangs up.

    Args:
        server: the server.
        values: the input.
        id: the prediction's id, for a PUT; None: a POST.
        accept: the header.
        body: what is beside the input; live audio unless `context` says otherwise.
    """
    method, path = ("PUT", f"/predictions/{id}") if id else ("POST", "/predictions")
    with requests.Session() as session:
        session.trust_env = False  # a proxy cannot reach the loopback device
        answer = session.request(
            method, server.url + path, json={"input": values, "context": LIVE} | body,
            headers={"Accept": accept}, stream=True, timeout=server.answer_s,
        )  # fmt: skip
        with answer:
            assert answer.headers["content-type"] == "text/event-stream", answer.text
            yield _parsed(answer)


def _parsed(answer: requests.Response) -> Iterator[Event]:
    name = ""
    for line in answer.iter_lines(chunk_size=None, decode_unicode=False):
        key, _, value = line.decode().partition(": ")
        if key == "event":
            name = value
        elif key == "data":
            yield Event(name, json.loads(value))


def chunks(seen: list[Event]) -> list[Json]:
    """The chunks among events."""
    return [event.chunk for event in seen if event.chunk is not None]


def audio(seen: list[Event]) -> npt.NDArray[np.int16]:
    """The samples [T, C] of all chunks among events. Checks that the chunks are complete and in order."""
    at, parts = 0, []
    for index, chunk in enumerate(chunks(seen)):
        assert (chunk["index"], chunk["offset"]) == (index, at)
        parts.append(np.frombuffer(base64.b64decode(chunk["pcm"]), "<i2").reshape(-1, chunk["channels"]))
        at += len(parts[-1])
    return np.concatenate(parts)
