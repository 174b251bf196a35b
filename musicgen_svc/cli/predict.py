"""One prediction from the command line: inputs in, an audio file out, through Cog's real HTTP server."""

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from musicgen_svc.cli.client import Client, FailedError
from musicgen_svc.cli.cog_log import sentence
from musicgen_svc.cli.inputs import UsageError, checked_url, request_input
from musicgen_svc.cli.output import STDOUT, checked_output, fetch, save
from musicgen_svc.cli.schema_fields import described, fields
from musicgen_svc.errors import InputError, ServiceError
from musicgen_svc.request import Request
from musicgen_svc.settings import Settings

Json = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = ROOT / "openapi_schema.json"

FAILED, USAGE, INTERRUPTED = 1, 2, 130
STAGES = ("load", "condition", "generate", "decode", "write")
STOP_S = 15.0
"""How long the server may take to stop; it promises 10 s."""
REPORT_S = 5.0
"""How often progress is told where it is not shown on a terminal."""

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
    parser.add_argument("--url", help="a Cog server that runs, http://HOST:PORT; without it, one is started")
    return parser.parse_args()


def own_schema() -> Json:
    """
    Raises:
        FailedError: the checkout's schema is gone or damaged.
    """
    try:
        schema: Json = json.loads(SCHEMA.read_text())
    except (OSError, ValueError) as error:
        raise FailedError(f"{SCHEMA} cannot be read ({error}): write it anew with scripts/schema.") from None
    return schema


def note(text: str) -> None:
    tqdm.write(text, file=sys.stderr)


def check_request(values: Json, schema: Json | None, max_duration_s: int) -> None:
    """The service's own rules, where the schema has this service's inputs.

    Raises:
        UsageError: in the service's words.
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
    except ServiceError:  # which the server tells, with all else that it needs
        return Settings.max_duration_s


# The server


@contextlib.contextmanager
def own_server() -> Iterator[Client]:
    """A server on a free loopback port, gone when the block ends, whatever happens.

    Its log is kept, and named, where the block ends with an error whose cause only the log holds.
    """
    folder = Path(tempfile.mkdtemp(prefix="musicgen-"))
    log, keep_log = folder / "server.log", False
    try:
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "musicgen_svc.cli.serve", "--stop-at-eof"],
                env=os.environ
                | {"HOST": "127.0.0.1", "PORT": "0", "LOG_FORMAT": "console", "COG_MAX_CONCURRENCY": "1"},
                stdin=subprocess.PIPE,  # closes with us, even if we are killed, and then the server stops
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for us: we stop the server in order
            )
        try:
            yield Client(_await_url(process, log))
        finally:
            _stop(process)
    except FailedError as error:
        if keep_log := error.in_log:
            error.add_note(f"The server's log: {log}")
        raise
    finally:
        if not keep_log:
            shutil.rmtree(folder, ignore_errors=True)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    assert process.stdin
    process.stdin.close()


def _await_url(process: "subprocess.Popen[bytes]", log: Path) -> str:
    """The URL that the server says it listens on."""
    while process.poll() is None:
        if found := re.search(r"http://\S+:\d+", log.read_text(errors="replace")):
            return found.group()
        time.sleep(0.05)
    text = log.read_text(errors="replace")
    raise FailedError(f"The server did not start: {sentence(text)}", in_log="Traceback" in text)


def set_up(client: Client) -> None:
    start = time.monotonic()
    if not sys.stderr.isatty():
        note("Setting up ...")
    with tqdm(bar_format="Setting up ... {elapsed}", leave=False, disable=None) as line:
        client.await_ready(line.refresh)
    note(f"Ready after {time.monotonic() - start:.1f} s.")


def predict(client: Client, values: Json, schema: Json | None) -> Json:
    """One prediction, with a bar from 0 to 100 %."""
    told = False

    def busy() -> None:
        nonlocal told
        if not told:
            note("The server is busy; trying again until it is not (Ctrl-C gives up).")
        told = True

    with Progress() as progress:
        reply = client.predict(values, schema, progress.show, busy)
        progress.show(100, "done")
    return reply


class Progress:
    """A bar on a terminal; elsewhere a line now and then, and none before there is progress."""

    def __init__(self) -> None:
        layout = "{desc:<10}{percentage:3.0f}%|{bar}| {elapsed}"
        self._bar = tqdm(total=100, bar_format=layout) if sys.stderr.isatty() else None
        self._percent, self._told_s = 0, -REPORT_S

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.leave = kind is None
            self._bar.close()

    def show(self, percent: int, stage: str) -> None:
        if self._bar is not None:
            self._bar.set_description_str(stage or self._bar.desc, refresh=False)
            self._bar.update(max(0, percent - self._bar.n))
            self._bar.refresh()  # also when nothing moved: the clock does
        elif percent > self._percent and (percent == 100 or time.monotonic() - self._told_s >= REPORT_S):
            self._percent, self._told_s = percent, time.monotonic()
            note(f"{stage or 'working':<10}{percent:3d}%")


def report(path: Path, reply: Json) -> None:
    """The path on a line of its own, for scripts; then what the service measured. Where the audio went to
    standard output, all of this goes to standard error.

    Raises:
        FailedError: standard output is closed. The file is written then.
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
    if path == STDOUT:
        for line in lines[1:]:
            note(line)
        return
    try:
        print("\n".join(lines), flush=True)
    except OSError as error:
        raise FailedError(f"{path} is written, but standard output cannot be: {error.strerror}.") from None


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def run(args: argparse.Namespace) -> None:
    """
    Raises:
        UsageError, FailedError: with the sentence for the user.
    """
    wanted = checked_output(args.output)
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
        reply = predict(client, values, schema)
        body, suffix = fetch(reply["output"])
        if wanted and wanted.suffix and wanted.suffix.lower() != suffix:
            note(f"{wanted.name} holds {suffix[1:]}: the format is chosen by -i output_format=...")
        path = save(body, suffix, wanted)
        report(path, reply)


def main() -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    if isinstance(
        sys.stdout, io.TextIOWrapper
    ):  # the name of a file may be any bytes, and is printed as such
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
