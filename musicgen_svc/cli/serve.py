"""`scripts/serve`: runs Cog's server in the foreground, supervised and with a readable log."""

import argparse
import asyncio
import errno
import os
import signal
import socket
import sys
import threading

from musicgen_svc.cli import prediction_folders
from musicgen_svc.cli.cog_log import Console
from musicgen_svc.cli.cog_server import ROOT, allow_open_files, concurrency, write_schema
from musicgen_svc.cli.gate import Gate
from musicgen_svc.cli.supervisor import StopRequest, Supervisor
from musicgen_svc.errors import ServiceError
from musicgen_svc.settings import Settings

HELP = """\
variables: COG_WEIGHTS, LOG_FORMAT (console; json: one JSON object a line), HOST and PORT (where --host and
--port are not given), and those in docs/settings.md. Ctrl-C or SIGTERM stops the server: predictions that run
may end within MUSICGEN_DRAIN_GRACE_S, unless a second one follows. The exit status is then 0, as after POST
/shutdown. A server that no longer serves is restarted, and the log says why.
"""


def listener(host: str, port: int) -> socket.socket:
    """Makes a socket that listens on an address. Port 0 is any free port.

    Raises:
        SystemExit: it cannot, with one sentence.
    """
    try:
        family, kind, _, _, name = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(name)
        bound.listen(1024)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            sys.exit(
                f"Port {port} on {host} is taken: stop what listens there, or choose another by PORT=..."
            )
        sys.exit(f"Cannot listen on HOST={host} PORT={port}: {error.strerror or error}.")
    return bound


def url(bound: socket.socket) -> str:
    """The URL by which clients reach a socket."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


async def serve(
    bound: socket.socket, more: list[str], console: Console, stop: StopRequest, stop_at_eof: bool
) -> int:
    """Runs the server until it is told to stop.

    Args:
        bound: the socket for clients.
        more: further arguments for Cog.
        console: for the log.
        stop: is called by the signals that stop the server.
        stop_at_eof: whether the end of standard input stops the server too.

    Returns:
        int: the exit status.
    """
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, stop)
    if stop_at_eof:  # the process that started this one has ended, for whatever reason

        def wait() -> None:
            while os.read(sys.stdin.fileno(), 4096):
                pass
            loop.call_soon_threadsafe(stop)

        threading.Thread(target=wait, daemon=True).start()
    gate = Gate()
    async with await gate.listen(bound):
        try:
            return await Supervisor(url(bound), more, gate, console, stop).run()
        finally:
            await gate.end()


def arguments() -> argparse.Namespace:
    """Reads the command line.

    Raises:
        SystemExit: it cannot be used.
    """
    parser = argparse.ArgumentParser(
        prog="scripts/serve", description="Runs Cog's server in the foreground.", epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--host", help="where to listen (default: HOST, or 127.0.0.1)")
    parser.add_argument("--port", help="the port; 0 picks a free one (default: PORT, or 5000)")
    parser.add_argument("--upload-url", help="where Cog puts outputs, instead of into the reply")
    parser.add_argument("--stop-at-eof", action="store_true", help="stop when standard input ends")
    given = parser.parse_args()
    given.host = given.host or os.environ.get("HOST") or "127.0.0.1"
    named = "--port" if given.port else "PORT"
    port = given.port or os.environ.get("PORT") or "5000"
    if not (port.isdecimal() and int(port) <= 65535):
        sys.exit(f"{named} is {port!r}; it must be a number from 0 (any that is free) to 65535.")
    given.port = int(port)
    allow_open_files(concurrency())  # its variables are read again for each server that is started
    return given


def main() -> int:
    """Runs the command. Returns the exit status."""
    given = arguments()
    try:
        stop = StopRequest(Settings.from_environment(os.environ).drain_grace_s)
    except ServiceError as error:
        sys.exit(str(error))
    bound = listener(given.host, given.port)
    try:
        prediction_folders.check()
    except prediction_folders.UnusableFolderError as error:
        sys.exit(str(error))
    try:
        write_schema(ROOT / ".cog")
    except OSError as error:
        sys.exit(
            f"The schema cannot be written to {error.filename} ({error.strerror}): let the owner of {ROOT} "
            "run scripts/serve once, or make it writable."
        )
    console = Console(sys.stdout, as_json=os.environ.get("LOG_FORMAT", "console") == "json")
    more = ["--upload-url", given.upload_url] if given.upload_url else []
    return asyncio.run(serve(bound, more, console, stop, given.stop_at_eof))


if __name__ == "__main__":
    sys.exit(main())
