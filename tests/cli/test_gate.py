"""The gate relays valid requests unchanged, and closes the connection to Cog when a client closes its own."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from musicgen_svc.cli.gate import Gate
from musicgen_svc.cli.prediction_folders import PredictionFolders
from musicgen_svc.cli.reaper import Reaper

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Setting:
    """A gate in front of a server whose answers a test defines."""

    def __init__(self) -> None:
        self.gate = Gate()
        self.heads: list[bytes] = []
        self._open: list[asyncio.Server] = []
        self._reaper = Reaper()

    async def start(self, handler: Handler, folder: Path) -> int:
        """Starts the server and the gate. Returns the gate's port."""

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.heads.append(await reader.readuntil(b"\r\n\r\n"))
            await handler(reader, writer)
            writer.close()
            await writer.wait_closed()

        behind = await asyncio.start_server(connected, "127.0.0.1", 0)
        listener = socket.create_server(("127.0.0.1", 0))
        self._open = [behind, await self.gate.listen(listener)]
        self.gate.relay_to(behind.sockets[0].getsockname()[1], PredictionFolders(self._reaper, folder))
        self.gate.open()
        port: int = listener.getsockname()[1]
        return port

    async def stop(self) -> None:
        """Stops both, and waits until every connection is closed."""
        for server in self._open:
            server.close()
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(others)
        self._reaper.reap()


def run(test: Callable[[Setting], Awaitable[None]]) -> None:
    """Runs a test that is a coroutine."""

    async def main() -> None:
        async with asyncio.timeout(60):
            setting = Setting()
            await test(setting)
            await setting.stop()

    asyncio.run(main())


async def answer_all(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    await writer.drain()


async def ask(port: int, content: bytes) -> bytes:
    """Sends bytes to a port, and returns the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(content)
    answer = await reader.read()
    writer.close()
    return answer


@pytest.mark.parametrize(
    ("sent", "relayed"),
    [
        (b"GET /health-check HTTP/1.1", b"GET /health-check HTTP/1.1"),
        (b"PUT /predictions/mine HTTP/1.1", b"PUT /predictions/mine HTTP/1.1"),
        (b"POST /predictions/mine/cancel HTTP/1.1", b"POST /predictions/mine/cancel HTTP/1.1"),
        (b"POST /predictions?x=1 HTTP/1.1", b"PUT /predictions/"),
        (b"GET / HTTP/1.0", b"GET / HTTP/1.0"),
    ],
)
def test_a_request_arrives_as_it_was_sent(tmp_path: Path, sent: bytes, relayed: bytes) -> None:
    async def test(setting: Setting) -> None:
        port = await setting.start(answer_all, tmp_path)
        answer = await ask(port, sent + b"\r\nHost: x\r\nPrefer: respond-async\r\nX-Mine: a  b\r\n\r\n")
        assert answer.endswith(b"\r\n\r\nok")
        head = setting.heads[0]
        assert head.startswith(relayed)
        assert b"\r\nPrefer: respond-async\r\nX-Mine: a  b\r\n" in head

    run(test)


def test_large_bodies_pass_both_ways_unchanged(tmp_path: Path) -> None:
    content = bytes(range(256)) * 40_000

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + await reader.readexactly(len(content)))
        await writer.drain()

    async def test(setting: Setting) -> None:
        port = await setting.start(echo, tmp_path)
        head = b"POST /predictions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(content)
        assert (await ask(port, head + content)).partition(b"\r\n\r\n")[2] == content

    run(test)


def test_an_answer_streams_while_it_is_made(tmp_path: Path) -> None:
    go_on = asyncio.Event()

    async def stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nevent: one\n\n")
        await writer.drain()
        await go_on.wait()
        writer.write(b"event: two\n\n")
        await writer.drain()

    async def test(setting: Setting) -> None:
        port = await setting.start(stream, tmp_path)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /predictions HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\n\r\n")
        await reader.readuntil(b"event: one\n\n")
        go_on.set()
        assert await reader.read() == b"event: two\n\n"
        writer.close()

    run(test)


def test_a_client_that_hangs_up_hangs_up_on_cog(tmp_path: Path) -> None:
    noticed = asyncio.Event()

    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1000):
            pass
        noticed.set()

    async def test(setting: Setting) -> None:
        port = await setting.start(wait, tmp_path)
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /predictions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
        while not setting.heads:
            await asyncio.sleep(0.01)
        writer.close()
        await noticed.wait()

    run(test)


def test_a_second_request_on_the_same_connection_is_not_relayed(tmp_path: Path) -> None:
    """The gate has checked the first request only."""

    async def test(setting: Setting) -> None:
        port = await setting.start(answer_all, tmp_path)
        first = b"GET /health-check HTTP/1.1\r\nHost: x\r\nConnection: keep-alive\r\n\r\n"
        await ask(port, first + b"PUT /predictions/%s HTTP/1.1\r\nHost: x\r\n\r\n" % (b"x" * 300))
        assert len(setting.heads) == 1
        assert b"\r\nConnection: close\r\n" in setting.heads[0]
        assert b"keep-alive" not in setting.heads[0]

    run(test)


@pytest.mark.parametrize("content", [b"\x16\x03\x01\x02\x00\r\n\r\n", b"GET / HTTP/9\r\n\r\n", b"x" * 70_000])
def test_what_is_no_http_is_told_so(tmp_path: Path, content: bytes) -> None:
    async def test(setting: Setting) -> None:
        port = await setting.start(answer_all, tmp_path)
        assert b"This is no HTTP request" in await ask(port, content)
        assert setting.heads == []

    run(test)


def test_predictions_wait_at_a_closed_gate_and_nothing_else_does(tmp_path: Path) -> None:
    async def test(setting: Setting) -> None:
        port = await setting.start(answer_all, tmp_path)
        setting.gate.close()
        waiting = asyncio.create_task(ask(port, b"POST /predictions HTTP/1.1\r\nHost: x\r\n\r\n"))
        assert (await ask(port, b"GET /health-check HTTP/1.1\r\nHost: x\r\n\r\n")).endswith(b"ok")
        assert not waiting.done()
        setting.gate.open()
        assert (await waiting).endswith(b"ok")

    run(test)
