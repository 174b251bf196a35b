"""Runs a prediction whose audio is heard while it is generated, over Cog's server-sent events.

docs/live.md describes the events. Their format is that of the HTML standard, of which only the fields `event`
and `data` are used; Cog sends each event's data as one line of JSON.
"""

import json
import uuid
from collections.abc import Callable, Iterator
from http import HTTPStatus

import requests

from musicgen_svc.cli.client import (
    CONNECT_S,
    Client,
    FailedError,
    OnProgress,
    progress,
    result,
    succeeded,
)
from musicgen_svc.runtime.json_object import Json

OnChunk = Callable[[Json], None]
"""Called with each chunk of audio, as `musicgen_svc/live.py` describes it."""

EVENT_S = 60.0
"""The longest time without an event or a sign of life, of which Cog sends one every 15 s."""
LOG_TAIL = 1000
"""Characters at the end of a log in which progress is looked for."""


def predict_live(
    client: Client, values: Json, on_progress: OnProgress, on_chunk: OnChunk, on_busy: Callable[[], None]
) -> Json:
    """Runs one prediction as `Client.predict`, and receives its audio while it is generated.

    Args:
        client: the client.
        values: the request's input.
        on_progress: called while the prediction runs.
        on_chunk: called with each chunk of audio.
        on_busy: called each time that the server is busy, before waiting.

    Returns:
        dict: Cog's reply, with `output` and `metrics`.

    Raises:
        FailedError: the prediction did not succeed, or the server sends no events.
    """
    path = f"/predictions/{uuid.uuid4().hex[:16]}"
    body = {"input": values, "context": {"live": "1"}}
    # The end of the session hangs up, but Cog ignores a hang-up in the first milliseconds: hence the cancel.
    with client.cancelling(path, lambda status: status == HTTPStatus.NOT_FOUND), client.session() as session:
        session.headers["Accept"] = "text/event-stream"

        def send() -> requests.Response:
            return session.put(client.url + path, json=body, stream=True, timeout=(CONNECT_S, EVENT_S))

        response = client.until_not_busy(send, on_busy)
        if response.headers.get("content-type", "").startswith("text/event-stream"):
            return succeeded(_follow(response, on_progress, on_chunk))
    if response.status_code == HTTPStatus.NOT_ACCEPTABLE:
        raise FailedError("The server sends no live audio, because its schema has no x-cog-streaming.")
    return result(response)


def _follow(response: requests.Response, on_progress: OnProgress, on_chunk: OnChunk) -> Json:
    """Passes on what the events tell, and returns the reply in the last one."""
    logs = ""
    for name, data in events(response):
        if name == "completed":
            return data
        if name == "error":
            raise FailedError(f"The server's events broke off: {data.get('error')}.")
        if name == "metric" and data["name"] == "audio" and data["value"]:
            on_chunk(data["value"])
        if name == "log":
            logs = (logs + data["data"])[-LOG_TAIL:]
            on_progress(*progress(logs))
    raise FailedError("The server closed the connection before the prediction ended.", in_log=True)


def events(response: requests.Response) -> Iterator[tuple[str, Json]]:
    """Yields the name and the data of each event. `response`: one that was requested with `stream=True`."""
    name = "message"
    for line in _lines(response):
        field, _, value = line.partition(b":")
        if field == b"event":
            name = value.strip().decode()
        elif field == b"data":
            yield name, json.loads(value)


def _lines(response: requests.Response) -> Iterator[bytes]:
    """Yields each line as soon as it is complete.

    `Response.iter_lines` would search a line of megabytes again with each part of it that arrives.
    """
    parts: list[bytes] = []
    for data in response.iter_content(None):
        *ended, rest = data.split(b"\n")
        for end in ended:
            yield b"".join([*parts, end])
            parts = []
        parts.append(rest)
