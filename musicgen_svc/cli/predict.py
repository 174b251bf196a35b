"""`scripts/predict`: one prediction from the command line, through Cog's HTTP server."""

import argparse
import contextlib
import io
import json
import os
import signal
import sys
import time
from pathlib import Path

from tqdm import tqdm

from musicgen_svc.cli.client import Client, FailedError
from musicgen_svc.cli.inputs import UsageError, checked_url, request_input
from musicgen_svc.cli.live import GrowingWav, Listener, installed_player, playing
from musicgen_svc.cli.live_client import predict_live
from musicgen_svc.cli.output import STDOUT, checked_output, fetch, save
from musicgen_svc.cli.own_server import own_server
from musicgen_svc.cli.schema_fields import described, fields
from musicgen_svc.cli.terminal import Progress, note
from musicgen_svc.errors import InputError, ServiceError
from musicgen_svc.request import Request
from musicgen_svc.runtime.json_object import Json
from musicgen_svc.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = ROOT / "openapi_schema.json"

FAILED, USAGE, INTERRUPTED = 1, 2, 130
STAGES = ("load", "condition", "generate", "decode", "write")

HELP = """\
inputs are written name=value:
{inputs}

As for `cog predict`, @ sends a file: input_audio=@clip.mp3. Unlike there,
prompt=@words.txt sends the words in the file and not a data URI (a prompt that
begins with @ is written prompt='"@..."'), and no input may be given twice.

exit status:
  0    the file is written, and its path printed
  1    the prediction, the server or the network failed; the reason is on
       standard error, and the server's log is kept where that holds more
  2    the command line cannot be used: an unknown input, a value that is not
       accepted, a file that cannot be read or written; nothing was started
  130  interrupted: the prediction was cancelled and the server stopped

`scripts/serve` shows the server's own log."""


def arguments() -> argparse.Namespace:
    """Reads the command line. Its help lists the inputs of the schema."""
    try:
        inputs = described(own_schema())
    except FailedError as error:
        inputs = f"  {error}"
    parser = argparse.ArgumentParser(
        prog="scripts/predict",
        description="Makes one audio file, by a server that it starts or by one that runs.",
        epilog=HELP.format(inputs=inputs),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "-i", "--input", action="append", default=[], metavar="NAME=VALUE", help="an input; may be repeated"
    )
    parser.add_argument(
        "-o", "--output", metavar="FILE",
        help="where to write, - for standard output; without it, a name that is free",
    )  # fmt: skip
    parser.add_argument(
        "--live", action="store_true",
        help="play the audio while it is generated; with -o - write it so, as a wav that grows",
    )  # fmt: skip
    parser.add_argument("--url", help="a Cog server that runs, http://HOST:PORT; without it, one is started")
    return parser.parse_args()


def own_schema() -> Json:
    """Reads the schema of this checkout.

    Raises:
        FailedError: the file is missing or damaged.
    """
    try:
        schema: Json = json.loads(SCHEMA.read_text())
    except (OSError, ValueError) as error:
        raise FailedError(f"{SCHEMA} cannot be read ({error}): write it anew with scripts/schema.") from None
    return schema


def check_request(values: Json, schema: Json | None, max_duration_s: int) -> None:
    """Checks the rules of the service that a schema cannot express.

    A schema with other inputs is that of another service, whose rules are not known here.

    Args:
        values: the request's input.
        schema: of the server.
        max_duration_s: the longest duration that the server accepts.

    Raises:
        UsageError: with the service's sentence.
    """
    known = fields(schema)
    if known is None or list(known) != list(fields(own_schema()) or {}):
        return
    given = {name: Path("file") if name == "input_audio" else value for name, value in values.items()}
    defaults = {name: field.get("default") for name, field in known.items()}
    try:
        Request.from_fields(defaults | given, max_duration_s)
    except InputError as error:
        hint = "" if values else ' Try -i prompt="a music box", and --help for all inputs.'
        raise UsageError(f"{error}{hint}") from None


def max_duration_s() -> int:
    """The longest duration that a server started from here accepts."""
    try:
        return Settings.from_environment(os.environ).max_duration_s
    except ServiceError:  # the server reports wrong settings when it starts
        return Settings.max_duration_s


def set_up(client: Client) -> None:
    """Waits until the server is ready, and shows how long this takes."""
    start = time.monotonic()
    if not sys.stderr.isatty():
        note("Setting up ...")
    with tqdm(bar_format="Setting up ... {elapsed}", leave=False, disable=None) as line:
        client.await_ready(line.refresh)
    note(f"Ready after {time.monotonic() - start:.1f} s.")


def predict(client: Client, values: Json, schema: Json | None, listener: Listener | None) -> Json:
    """Runs one prediction and shows its progress.

    Args:
        client: of the server.
        values: the request's input.
        schema: of the server.
        listener: gets the audio while it is generated; None: nobody hears it.

    Returns:
        dict: Cog's reply.
    """
    noted = False

    def busy() -> None:
        nonlocal noted
        if not noted:
            note("The server is busy; trying again until it is not (Ctrl-C gives up).")
        noted = True

    with Progress() as progress:
        if listener is None:
            reply = client.predict(values, schema, progress.show, busy)
        else:
            reply = predict_live(client, values, progress.show, listener.add, busy)
        progress.show(100, "done")
    return reply


def report(path: Path, reply: Json, to_stderr: bool) -> None:
    """Prints the path on a line of its own, for scripts, and then what the service measured.

    Args:
        path: of the output.
        reply: Cog's.
        to_stderr: whether audio went to standard output, so that this must go to standard error.

    Raises:
        FailedError: standard output is closed. The file is already written.
    """
    metrics = reply.get("metrics") or {}
    facts = []
    if "audio_seconds" in metrics:
        facts.append(f"{metrics['audio_seconds']:.2f} s of audio")
    if "seed" in metrics:
        facts.append(f"seed {metrics['seed']}")
    if "steps" in metrics:
        facts.append(f"{metrics['steps']} steps")
    times = [f"{stage} {metrics[stage]:.2f} s" for stage in STAGES if stage in metrics]
    lines = [str(path), *("  " + ", ".join(line) for line in (facts, times) if line)]
    if to_stderr:
        for line in lines[path == STDOUT :]:
            note(line)
        return
    try:
        print("\n".join(lines), flush=True)
    except OSError as error:
        raise FailedError(f"{path} is written, but standard output cannot be: {error.strerror}.") from None


def interrupt(*_: object) -> None:
    """Handles a signal like Ctrl-C."""
    raise KeyboardInterrupt


def run(args: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
        UsageError: the command line cannot be used.
        FailedError: the prediction, the server or the network failed.
    """
    wanted = checked_output(args.output)
    player = installed_player() if args.live and wanted != STDOUT else None
    with contextlib.ExitStack() as stack:
        if args.url is not None:
            client = Client(checked_url(args.url))
            if client.health()["status"] not in ("READY", "BUSY"):
                set_up(client)
            schema = client.schema()
            values = request_input(args.input, schema)
            check_request(values, schema, Settings.max_duration_s)
        else:
            schema = own_schema()
            values = request_input(args.input, schema)
            check_request(values, schema, max_duration_s())
            client = stack.enter_context(own_server())
            set_up(client)
        listener: Listener | None = None
        if args.live:
            listener = stack.enter_context(playing(player)) if player else GrowingWav(sys.stdout.buffer)
        reply = predict(client, values, schema, listener)
        body, suffix = fetch(reply["output"])
        to_stdout = wanted == STDOUT
        if listener is not None and to_stdout:
            wanted = None  # the audio was written already, and the file gets a name of its own
        if wanted and wanted.suffix and wanted.suffix.lower() != suffix:
            note(f"{wanted.name} holds {suffix[1:]}: the format is chosen by -i output_format=...")
        path = save(body, suffix, wanted)
        report(path, reply, to_stdout)
        if listener is not None:
            listener.finish()


def main() -> int:
    """Runs the command and prints errors. Returns the exit status."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    if isinstance(sys.stdout, io.TextIOWrapper):  # prints any bytes in a file's name unchanged
        sys.stdout.reconfigure(errors="surrogateescape")
    try:
        run(arguments())
    except (UsageError, FailedError) as error:
        note("\n".join([str(error), *getattr(error, "__notes__", [])]))
        return USAGE if isinstance(error, UsageError) else FAILED
    except KeyboardInterrupt as error:
        note("\n".join(["Interrupted.", *getattr(error, "__notes__", [])]))
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
