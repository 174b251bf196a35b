"""One prediction from the command line: inputs in, an audio file out, through Cog's real HTTP server."""

import argparse
import base64
import binascii
import contextlib
import json
import mimetypes
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import requests
from _client import Client, FailedError, sentence
from _inputs import UsageError, expanded, request_input
from tqdm import tqdm

Json = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = ROOT / "openapi_schema.json"

FAILED, USAGE, INTERRUPTED = 1, 2, 130
STAGES = ("load", "condition", "generate", "decode", "write")
SUFFIXES = {"audio/wav": ".wav", "audio/x-wav": ".wav", "audio/mpeg": ".mp3"}
STOP_S = 15.0
"""How long the server may take to stop; it promises 10 s."""

HELP = """\
inputs are written as for `cog predict`: name=value, and input_audio=@FILE or an http(s) URL.

exit status:
  0    the file is written, and its path printed
  1    the prediction, the server or the network failed; the reason is on standard error
  2    the command line cannot be used: an unknown input, a file that cannot be read or written
  130  interrupted: the prediction was cancelled and the server stopped

`scripts/serve` shows the server's own log."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/predict",
        description="Makes one audio file, with a server that is started for it or with one that runs.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "-i", "--input", action="append", default=[], metavar="NAME=VALUE", help="an input; may be repeated"
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="where to write; without it, a name that is free"
    )
    parser.add_argument("--url", help="a Cog server that runs, http://HOST:PORT; without it, one is started")
    return parser.parse_args()


def note(text: str) -> None:
    tqdm.write(text, file=sys.stderr)


# The server


@contextlib.contextmanager
def own_server() -> Iterator[Client]:
    """A server on a free loopback port, gone when the block ends, whatever happens."""
    folder = Path(tempfile.mkdtemp(prefix="musicgen-"))
    log = folder / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "scripts" / "_serve.py"), "--stop-at-eof"],
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
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdin
        process.stdin.close()
        shutil.rmtree(folder, ignore_errors=True)


def _await_url(process: "subprocess.Popen[bytes]", log: Path) -> str:
    """The URL that the server says it listens on."""
    while process.poll() is None:
        if found := re.search(r"http://\S+:\d+", log.read_text(errors="replace")):
            return found.group()
        time.sleep(0.05)
    raise FailedError(f"The server did not start: {sentence(log.read_text(errors='replace'))}")


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

    layout = "{desc:<10}{percentage:3.0f}%|{bar}| {elapsed}"
    live = sys.stderr.isatty()  # else, in a log, a line now and then is enough
    with tqdm(total=100, bar_format=layout, mininterval=0.1 if live else 5.0) as bar:

        def show(percent: int, stage: str) -> None:
            bar.set_description_str(stage or bar.desc, refresh=False)
            bar.update(max(0, percent - bar.n))
            if live:  # also when nothing moved: the clock does
                bar.refresh()

        reply = client.predict(values, schema, show, busy)
        show(100, "done")
    return reply


# The output


def checked_output(path: Path | None) -> Path | None:
    """The file to write, known before minutes of work and not after.

    Raises:
        UsageError: it cannot be written, or a file of any name here.
    """
    if path is None:
        if not os.access(Path(), os.W_OK):
            raise UsageError(f"{Path().absolute()} cannot be written to: name a file elsewhere with -o.")
        return None
    path = expanded(path)
    if path.is_dir():
        raise UsageError(f"-o {path}: that is a folder; name a file in it.")
    parent = path.resolve().parent
    if not parent.is_dir():
        raise UsageError(f"-o {path}: there is no folder {parent}.")
    if not os.access(path if _takes_bytes_alone(path) else parent, os.W_OK):
        raise UsageError(f"-o {path}: {parent} cannot be written to.")
    return path


def _takes_bytes_alone(path: Path) -> bool:
    """A device or a pipe, such as /dev/null or /dev/stdout: written to, never replaced."""
    return path.exists() and not path.is_file()


def fetch(output: str) -> tuple[bytes, str]:
    """The bytes of Cog's output, a data URI or the URL it was uploaded to, and their suffix."""
    if output.startswith("data:"):
        head, _, data = output[len("data:") :].partition(",")
        kind, *options = head.split(";")
        try:
            body = base64.b64decode(data, validate=True) if "base64" in options else unquote_to_bytes(data)
        except binascii.Error:
            raise FailedError("The server's output is damaged: its base64 does not decode.") from None
    else:
        try:
            response = requests.get(output, timeout=(10, 60))
            response.raise_for_status()
        except requests.RequestException as error:
            raise FailedError(f"The output at {output} cannot be fetched: {error}") from None
        body, kind = response.content, response.headers.get("content-type", "").partition(";")[0]
    suffix = SUFFIXES.get(kind) or mimetypes.guess_extension(kind)
    return body, suffix or Path(output[:1000].partition("?")[0]).suffix or ".bin"


def save(body: bytes, suffix: str, wanted: Path | None) -> Path:
    """Writes all or nothing; over no file but the wanted one, or the one that it links to."""
    target = wanted.resolve() if wanted else None
    temporary = (target.parent if target else Path()) / f".output-{uuid.uuid4().hex}"
    try:
        if wanted and _takes_bytes_alone(wanted):
            wanted.write_bytes(body)
            return wanted
        temporary.write_bytes(body)
        target = target or _free_name(suffix)
        temporary.replace(target)
    except OSError as error:
        raise FailedError(f"The output cannot be written to {error.filename}: {error.strerror}.") from None
    finally:
        temporary.unlink(missing_ok=True)
    return wanted or target


def _free_name(suffix: str) -> Path:
    """The first of output.wav, output-1.wav, ... that is free, taken by creating it."""
    number = 0
    while True:
        path = Path(f"output-{number}{suffix}" if number else f"output{suffix}")
        with contextlib.suppress(FileExistsError):
            path.open("xb").close()
            return path
        number += 1


def report(path: Path, reply: Json) -> None:
    """The path on a line of its own, for scripts; then what the service measured."""
    print(path)
    metrics = reply.get("metrics") or {}
    facts = []
    if "audio_seconds" in metrics:
        facts.append(f"{metrics['audio_seconds']:.2f} s of audio")
    if "seed" in metrics:
        facts.append(f"seed {metrics['seed']}")
    if "steps" in metrics:
        facts.append(f"{metrics['steps']} steps")
    times = [f"{stage} {metrics[stage]:.2f} s" for stage in STAGES if stage in metrics]
    for line in (facts, times):
        if line:
            print("  " + ", ".join(line))


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def run(args: argparse.Namespace) -> None:
    """
    Raises:
        UsageError, FailedError: with the sentence for the user.
    """
    wanted = checked_output(args.output)
    with contextlib.ExitStack() as stack:
        if args.url:
            client = Client(args.url)
            client.await_ready()
            schema = client.schema()
            values = request_input(args.input, schema)
        else:
            schema = json.loads(SCHEMA.read_text())
            values = request_input(args.input, schema)
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
    try:
        run(arguments())
    except UsageError as error:
        note(str(error))
        return USAGE
    except FailedError as error:
        note(str(error))
        return FAILED
    except KeyboardInterrupt:
        note("Interrupted.")
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
