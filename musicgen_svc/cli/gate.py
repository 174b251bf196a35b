"""The gate in front of Cog: takes each connection, refuses ids that Cog cannot bear, and relays the rest.

Cog makes a folder named after the id that a client chose for a prediction. Where that fails, as for a name of
more than 255 characters, it loses one of its places for ever, and an id such as `/etc/x` is a path. So the
gate looks at the head of each request and relays everything else as it is, one request per connection. It
knows nothing of inputs and outputs. While Cog is restarted it keeps predictions waiting.
"""

import asyncio
import contextlib
import json
import re
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

import h11

from musicgen_svc.cli.prediction_folders import PredictionFolders

ID = re.compile(rb"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
RESOURCES = (b"predictions", b"trainings")
HEAD_BYTES, HEAD_S = 65536, 60.0
"""How large the head of a request may be, and how long it may take to arrive."""
CHUNK_BYTES = 65536
HOLD_S = 180.0
"""How long a prediction waits for Cog to come back."""
CONNECT_POLL_S = 0.1
LINGER_S = 2.0
"""How long what a client still sends is read after its answer: else TCP may drop the answer."""
HOP_BY_HOP = (b"connection", b"keep-alive", b"proxy-connection", b"upgrade", b"http2-settings")


class Refusal(Exception):
    """A request that does not go to Cog."""

    def __init__(self, status: int, problem: object) -> None:
        super().__init__(problem)
        self.status = status
        self.problem = problem


class Passage(NamedTuple):
    """A request that goes to Cog."""

    head: bytes
    """Up to and including the empty line."""
    body: bytes
    """As far as it came with the head."""
    id: str | None
    """The prediction's, if the request is about one."""
    creates: bool
    """Whether it may start a prediction."""


class Gate:
    """Listens for clients, and relays to the Cog server that runs now."""

    def __init__(self) -> None:
        self._port: int | None = None
        self._folders: PredictionFolders | None = None
        self._open = asyncio.Event()

    async def listen(self, listener: socket.socket) -> asyncio.Server:
        """Serves the connections of a socket that is bound already."""
        return await asyncio.start_server(self._connected, sock=listener)

    def lead_to(self, port: int, folders: PredictionFolders) -> None:
        """Relays to the Cog server at this port of the loopback device."""
        self._port, self._folders = port, folders

    def open(self) -> None:
        """Lets predictions through."""
        self._open.set()

    def close(self) -> None:
        """Keeps new predictions waiting until it is opened. All other requests pass."""
        self._open.clear()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            try:
                async with asyncio.timeout(HEAD_S):
                    passage = await _read_passage(reader)
                if passage is not None:
                    await self._relay(passage, reader, writer)
            except TimeoutError:
                pass
            except Refusal as refusal:
                writer.write(_answer(refusal))
                await _drain_and_linger(reader, writer)
        with contextlib.suppress(OSError):
            writer.close()

    async def _relay(
        self, passage: Passage, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            async with asyncio.timeout(HOLD_S):
                from_cog, to_cog = await self._connect(waits=passage.creates)
        except TimeoutError:
            raise Refusal(503, "The server is being restarted: try again later.") from None
        with self._requested(passage.id):
            try:
                to_cog.write(passage.head + passage.body)
                await _both_ways(reader, to_cog, from_cog, writer)
            finally:
                to_cog.close()

    async def _connect(self, waits: bool) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to Cog as soon as it listens, and if it `waits`, as soon as the gate is open."""
        while True:
            if waits:
                await self._open.wait()
            if self._port is not None:
                with contextlib.suppress(ConnectionRefusedError):
                    return await asyncio.open_connection("127.0.0.1", self._port)
            await asyncio.sleep(CONNECT_POLL_S)

    @contextmanager
    def _requested(self, id: str | None) -> Iterator[None]:
        folders = self._folders
        if id is None or folders is None:
            yield
            return
        folders.requested(id)
        try:
            yield
        finally:
            folders.answered(id)


async def _read_passage(reader: asyncio.StreamReader) -> Passage | None:
    """Reads the head of a request. None: the client has gone.

    Raises:
        Refusal: it is no HTTP request, or none that Cog may see.
    """
    parser = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES)
    try:
        while (event := parser.next_event()) is h11.NEED_DATA:
            data = await reader.read(CHUNK_BYTES)
            if not data:
                return None
            parser.receive_data(data)
    except h11.RemoteProtocolError as error:
        raise Refusal(error.error_status_hint, f"This is no HTTP request: {error}.") from None
    assert isinstance(event, h11.Request)
    method, target, id = _checked(event.method, event.target)
    lines = [b"%s %s HTTP/%s" % (method, target, event.http_version)]
    lines += [
        b"%s: %s" % (name, value)
        for name, value in event.headers.raw_items()
        if name.lower() not in HOP_BY_HOP
    ]
    lines += [b"Connection: close", b"", b""]
    return Passage(
        b"\r\n".join(lines), parser.trailing_data[0], id, creates=id is not None and method == b"PUT"
    )


def _checked(method: bytes, target: bytes) -> tuple[bytes, bytes, str | None]:
    """A request's method and target as Cog gets them, and the id of the prediction that it is about.

    A POST to /predictions gets an id here, and becomes the PUT that means the same: Cog then refuses
    another id in its body.

    Raises:
        Refusal: the target is no path, or the id is none that a folder can be named after.
    """
    if not target.startswith(b"/") or b"#" in target:
        raise Refusal(400, f"The target {target.decode()[:80]!r} is not a path on this server.")
    path, question, query = target.partition(b"?")
    _, resource, *rest = path.split(b"/")
    if resource not in RESOURCES:
        return method, target, None
    if not rest:
        if method != b"POST":
            return method, target, None
        id = uuid.uuid4().hex
        return b"PUT", b"/%s/%s" % (resource, id.encode()) + question + query, id
    name = unquote_to_bytes(rest[0])
    if not ID.fullmatch(name):
        problem = (
            f"The id {name[:40].decode(errors='replace')!r}{' ...' if len(name) > 40 else ''} is not usable: "
            "it must be 1 to 128 letters, digits, dots, hyphens and underscores, first a letter or digit."
        )
        raise Refusal(422, [{"loc": ["path", "prediction_id"], "msg": problem, "type": "value_error"}])
    return method, target, name.decode()


def _answer(refusal: Refusal) -> bytes:
    """The answer to a refused request, in the words that Cog has for the same."""
    body = json.dumps({"detail" if refusal.status == 422 else "error": refusal.problem}).encode()
    return (
        b"HTTP/1.1 %d %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"
        % (refusal.status, {422: b"Unprocessable Entity", 503: b"Service Unavailable"}.get(
            refusal.status, b"Bad Request"), len(body))
    ) + body  # fmt: skip


async def _both_ways(
    client: asyncio.StreamReader, to_cog: asyncio.StreamWriter,
    from_cog: asyncio.StreamReader, to_client: asyncio.StreamWriter,
) -> None:  # fmt: skip
    """Copies until Cog has answered, or the client has hung up, which is how it cancels."""
    up = asyncio.create_task(_copy(client, to_cog))
    down = asyncio.create_task(_copy(from_cog, to_client))
    try:
        await asyncio.wait((up, down), return_when=asyncio.FIRST_COMPLETED)
        if down.done():
            down.result()
            up.cancel()
            await asyncio.wait((up,))
            await _drain_and_linger(client, to_client)
        elif up.exception():  # Cog reads no more, and so has answered, or is gone
            await down
    finally:
        up.cancel()
        down.cancel()
        await asyncio.gather(up, down, return_exceptions=True)


async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    while data := await source.read(CHUNK_BYTES):
        target.write(data)
        await target.drain()


async def _drain_and_linger(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Sends what is left, and reads on for a moment."""
    await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            while await reader.read(CHUNK_BYTES):
                pass
