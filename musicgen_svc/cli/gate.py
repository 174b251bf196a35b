"""The HTTP gate in front of Cog: accepts all connections, refuses unusable ids, and relays everything else.

It answers requests for the player page itself (`player.py`).

Cog makes a folder named after the id that a client chose for a prediction. If that fails, as for a name of
more than 255 characters, Cog loses one of its places for ever; and an id such as `/etc/x` is a path. The gate
therefore reads the head of each request, and relays the rest unchanged, one request per connection. It knows
nothing about inputs and outputs. While Cog is restarted, the gate keeps predictions waiting. When the server
stops, it refuses new ones.
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

from musicgen_svc.cli.player import page
from musicgen_svc.cli.prediction_folders import PredictionFolders
from musicgen_svc.errors import DrainingError

ID = re.compile(rb"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""Ids that are safe as the name of a folder."""
RESOURCES = (b"predictions", b"trainings")
HEAD_BYTES, HEAD_S = 65536, 60.0
"""How large the head of a request may be, and how long it may take to arrive."""
CHUNK_BYTES = 65536
HOLD_S = 180.0
"""How long a prediction waits for Cog to come back."""
CONNECT_POLL_S = 0.1
LINGER_S = 2.0
"""How long a client's data is read after its answer was sent. Otherwise TCP may drop the answer."""
END_S = 5.0
"""How long clients may take to read their answers when the server ends."""
HOP_BY_HOP = (b"connection", b"keep-alive", b"proxy-connection", b"upgrade", b"http2-settings")


class Refusal(Exception):
    """A request that is not relayed to Cog."""

    def __init__(self, status: int, problem: object) -> None:
        """Makes a refusal. `status`: of HTTP; `problem`: for the body, as JSON."""
        super().__init__(problem)
        self.status = status
        self.problem = problem


class RelayedRequest(NamedTuple):
    """A request that is relayed to Cog."""

    head: bytes
    """Up to and including the empty line."""
    body: bytes
    """The part of the body that arrived with the head."""
    id: str | None
    """The prediction's id, if the request is about one."""
    creates: bool
    """Whether the request may start a prediction."""


class Gate:
    """Listens for clients, and relays to the Cog server that runs now."""

    def __init__(self) -> None:
        self._port: int | None = None
        self._folders: PredictionFolders | None = None
        self._open = asyncio.Event()
        self._draining = False
        self._connections: set[asyncio.Task[None]] = set()

    async def listen(self, listener: socket.socket) -> asyncio.Server:
        """Serves the connections of a bound socket."""
        return await asyncio.start_server(self._connected, sock=listener)

    def relay_to(self, port: int, folders: PredictionFolders) -> None:
        """Relays from now on to the Cog server at this port of the loopback device."""
        self._port, self._folders = port, folders

    def open(self) -> None:
        """Lets predictions through, also those that wait."""
        self._open.set()

    def close(self) -> None:
        """Keeps new predictions waiting until the gate is opened. Lets all other requests through."""
        self._open.clear()

    def drain(self) -> None:
        """Refuses new predictions, and those that wait for Cog. Lets all other requests through."""
        self._draining = True
        self._open.set()  # wakes those that wait for Cog, so that they are refused

    async def end(self) -> None:
        """Waits until clients have read their answers, at most for END_S, and closes all connections."""
        if self._connections:
            _, open_ones = await asyncio.wait(self._connections, timeout=END_S)
            for connection in open_ones:
                connection.cancel()

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serves one connection in a task of its own."""
        connection = asyncio.create_task(self._serve(reader, writer))
        self._connections.add(connection)

        def ended(connection: asyncio.Task[None]) -> None:
            self._connections.discard(connection)
            if connection.cancelled():
                writer.transport.abort()  # a close would wait until the client has read everything

        connection.add_done_callback(ended)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serves one connection."""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            try:
                async with asyncio.timeout(HEAD_S):
                    request = await _read_request(reader)
                if isinstance(request, bytes):
                    writer.write(request)
                    await _drain_and_linger(reader, writer)
                elif request is not None:
                    await self._relay(request, reader, writer)
            except TimeoutError:
                pass
            except Refusal as refusal:
                writer.write(_answer(refusal))
                await _drain_and_linger(reader, writer)
        with contextlib.suppress(OSError):
            writer.close()

    async def _relay(
        self, request: RelayedRequest, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            async with asyncio.timeout(HOLD_S):
                from_cog, to_cog = await self._connect(request)
        except TimeoutError:
            raise Refusal(503, "The server is being restarted: try again later.") from None
        with self._keeping_folder(request.id):
            try:
                to_cog.write(request.head + request.body)
                await _both_ways(reader, to_cog, from_cog, writer)
            finally:
                to_cog.close()

    async def _connect(self, request: RelayedRequest) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connects to Cog as soon as it listens; for a new prediction not before the gate is open.

        Raises:
            Refusal: the server stops, and the request would start a prediction.
        """
        while True:
            if request.creates:
                await self._open.wait()
                if self._draining and not (self._folders and self._folders.runs(request.id)):
                    raise Refusal(503, str(DrainingError()))
            if self._port is not None:
                with contextlib.suppress(ConnectionRefusedError):
                    return await asyncio.open_connection("127.0.0.1", self._port)
            await asyncio.sleep(CONNECT_POLL_S)

    @contextmanager
    def _keeping_folder(self, id: str | None) -> Iterator[None]:
        """Context manager: while a request with this id is on its way, the folder of the id is kept."""
        folders = self._folders
        if id is None or folders is None:
            yield
            return
        folders.requested(id)
        try:
            yield
        finally:
            folders.answered(id)


async def _read_request(reader: asyncio.StreamReader) -> RelayedRequest | bytes | None:
    """Reads the head of a request.

    Returns:
        The request; or the whole answer, if Cog does not give it; or None if the client has closed the
        connection.

    Raises:
        Refusal: this is no HTTP request, or it must not reach Cog.
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
    if (answer := page(event.method, event.target)) is not None:
        return answer
    method, target, id = _checked(event.method, event.target)
    lines = [b"%s %s HTTP/%s" % (method, target, event.http_version)]
    lines += [
        b"%s: %s" % (name, value)
        for name, value in event.headers.raw_items()
        if name.lower() not in HOP_BY_HOP
    ]
    lines += [b"Connection: close", b"", b""]
    return RelayedRequest(
        b"\r\n".join(lines), parser.trailing_data[0], id, creates=id is not None and method == b"PUT"
    )


def _checked(method: bytes, target: bytes) -> tuple[bytes, bytes, str | None]:
    """Checks a request's method and target.

    A POST to /predictions gets an id here, and becomes the PUT that means the same. Cog then refuses a
    different id in the body.

    Returns:
        tuple: method and target for Cog, and the prediction's id if the request is about one.

    Raises:
        Refusal: the target is no path, or no folder can be named after the id.
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
    """Makes the answer to a refused request, in the format of Cog's own answers."""
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
    """Copies in both directions until Cog has answered, or the client cancels by closing its connection."""
    up = asyncio.create_task(_copy(client, to_cog))
    down = asyncio.create_task(_copy(from_cog, to_client))
    try:
        await asyncio.wait((up, down), return_when=asyncio.FIRST_COMPLETED)
        if down.done():
            down.result()
            up.cancel()
            await asyncio.wait((up,))
            await _drain_and_linger(client, to_client)
        elif up.exception():  # Cog no longer reads: it has answered or ended
            await down
    finally:
        up.cancel()
        down.cancel()
        await asyncio.gather(up, down, return_exceptions=True)


async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    """Copies until the source ends."""
    while data := await source.read(CHUNK_BYTES):
        target.write(data)
        await target.drain()


async def _drain_and_linger(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Sends the rest of the answer, and then reads what the client still sends for LINGER_S."""
    await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            while await reader.read(CHUNK_BYTES):
                pass
