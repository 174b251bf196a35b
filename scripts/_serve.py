"""Runs Cog's server in the foreground, keeps its console readable and leaves nothing behind.

Cog's server is two processes, coglet and a Python worker. They run here in a process group of their
own and with a temporary folder of their own, so that both can be removed whatever state they are in.
"""

import argparse
import contextlib
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import TextIO

from _client import Client, FailedError, sentence

from musicgen_svc.storage import WorkFolder

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = ROOT / "openapi_schema.json"

OPEN_REQUESTS_S = 5.0
"""How long requests that are running may take to end; coglet itself would wait for ever."""
GROUP_END_S = 3.0
"""How long killed processes may take to go."""
LARGE_GB, PLACE_GB = 14, 1.8
"""Of a GPU: `large` with what is beside it, and 4 GB for MultiBand Diffusion; and a request's caches then."""
MOST_AT_ONCE = 16
COGLET_FOLDER = Path("/tmp/coglet/predictions")
"""Fixed in coglet, whatever TMPDIR says: it makes two folders a prediction here, and leaves them."""
PATHS = ("COG_WEIGHTS", "MUSICGEN_WEIGHTS_DIR", "MUSICGEN_WORK_DIR")
"""Settings that may hold a path relative to where the user is; the server runs elsewhere."""

SAID_BETTER = ("Setup failed", "Worker initialization failed")
"""What coglet logs when set-up fails, beside what we say."""


class Console:
    """Renders coglet's JSON log: our words with the time and the prediction, progress on one line."""

    def __init__(self, out: TextIO, raw: bool) -> None:
        self._out = out
        self._raw = raw
        self._lock = threading.Lock()
        self._in_progress = False
        self.predictions: set[str] = set()
        """Ids of every prediction that was started."""

    def say(self, text: str) -> None:
        self._line(f"{datetime.now():%H:%M:%S} {text}")

    def log(self, line: str) -> None:
        """One line of coglet's; what is not its JSON, such as a Python traceback, is shown as it is."""
        try:
            record = json.loads(line)
            fields, stamp = record["fields"], datetime.fromisoformat(record["timestamp"]).astimezone()
            message = str(fields["message"])
        except (ValueError, KeyError, TypeError):
            self._line(line)
            return
        prediction = fields.get("prediction_id")
        if prediction and message == "Starting prediction":
            self.predictions.add(prediction)
        if self._raw:
            self._line(line)
            return
        if message in SAID_BETTER:
            return
        if "error" in fields:
            message += f": {sentence(str(fields['error']))}"
        text = f"{stamp:%H:%M:%S} {f'[{prediction}] ' if prediction else ''}{message}"
        if "%|" in message and self._out.isatty():
            self._progress(text)
        else:
            self._line(text)

    def _line(self, text: str) -> None:
        self._write(("\n" if self._in_progress else "") + text + "\n", in_progress=False)

    def _progress(self, text: str) -> None:
        self._write(f"\r{text}\033[K", in_progress=True)

    def _write(self, text: str, in_progress: bool) -> None:
        with self._lock, contextlib.suppress(OSError):  # nobody reads us: no reason to stop the server
            self._in_progress = in_progress
            self._out.write(text)
            self._out.flush()


def address(host: str, port: int) -> tuple[str, int]:
    """The IP address (coglet takes no names) and a port on it that is free now; 0 picks one.

    Raises:
        SystemExit: the address cannot be listened on, in one sentence.
    """
    try:
        family, kind, _, _, name = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(name)
            return str(name[0]), probe.getsockname()[1]
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            sys.exit(
                f"Port {port} on {host} is taken: stop what listens there, or choose another by PORT=..."
            )
        sys.exit(f"Cannot listen on HOST={host} PORT={port}: {error.strerror or error}.")


def check_coglet_folder() -> None:
    """
    Raises:
        SystemExit: another user's, or full. A prediction for which coglet cannot make its folders takes one
            of its places for ever.
    """
    try:
        COGLET_FOLDER.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=COGLET_FOLDER):
            pass
    except OSError as error:
        sys.exit(
            f"Cog cannot write to {COGLET_FOLDER} ({error.strerror or error}), which it must: remove it, or "
            "have its owner do so."
        )


def place_schema(folder: Path) -> None:
    """Puts the schema where coglet looks for it; another server may be doing the same right now."""
    folder.mkdir(exist_ok=True)
    temporary = folder / f"openapi_schema.json.{os.getpid()}"
    shutil.copyfile(SCHEMA, temporary)
    temporary.replace(folder / "openapi_schema.json")


def warning_filters() -> str:
    """Python's warnings: ours are shown, everybody else's not. The variable takes no wildcards."""
    files = sorted((ROOT / "musicgen_svc").rglob("*.py"))
    modules = [
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files
    ]
    return ",".join(["ignore", *(f"default:::{module}" for module in [*modules, "predict"])])


def environment(port: int, temporary: Path) -> dict[str, str]:
    """The server's variables: the user's own, what the user may override, and what must be."""
    quiet = {
        "PYTHONWARNINGS": warning_filters(),
        "RUST_LOG": "warn,coglet::setup=info,coglet::user=info,coglet::prediction=info",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    fixed = {
        "COG_PREDICT_TYPE_STUB": "predict.py:Predictor",
        "HF_HUB_OFFLINE": "1",
        "LOG_FORMAT": "json",  # for Console
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",  # Cog runs `python`
        "PORT": str(port),
        "TMPDIR": str(temporary),
    }
    paths = {
        name: str(Path(os.environ[name]).absolute())  # a link stays one: what lies beside it counts
        for name in PATHS
        if os.environ.get(name) and Path(os.environ[name]).exists()
    }
    at_once = {} if os.environ.get("COG_MAX_CONCURRENCY") else {"COG_MAX_CONCURRENCY": str(concurrency())}
    return quiet | os.environ | at_once | paths | fixed


def concurrency() -> int:
    """How many predictions run at once, unless the user says it: what the smallest GPU holds, else one."""
    if os.environ.get("MUSICGEN_DEVICE") == "cpu":
        return 1
    try:  # torch knows better, but takes seconds to ask
        shown = subprocess.run(
            ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"],
            capture_output=True, timeout=10,
        )  # fmt: skip
        memory_gb = min(int(line) for line in shown.stdout.splitlines()) * 2**20 / 1e9
    except (OSError, subprocess.TimeoutExpired, ValueError):  # there is none, or it is none of NVIDIA's
        return 1
    held = min(max(1, int((memory_gb - LARGE_GB) / PLACE_GB)), MOST_AT_ONCE)
    return 1 << (held.bit_length() - 1)  # steps are computed for 1, 2, 4, 8 ... of them


class StopRequest:
    """How often we were told to stop: once, and open requests get their time; twice, and they do not."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, *_: object) -> None:
        self.times += 1


class Server:
    """Cog's server as a child, from its start until no process and no file of it is left."""

    def __init__(self, host: str, port: int, more: list[str], console: Console, stop: StopRequest) -> None:
        self._host, self._port, self._console, self._stop = host, port, console, stop
        self._folder = WorkFolder()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cog.server.http", "--host", _in_url(host), *more],
            cwd=ROOT,
            env=environment(port, self._folder.new_request()),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # a process group to kill, and Ctrl-C comes to us alone
        )

    def run(self) -> int:
        """Returns when everything is gone: 0 if we were asked to stop, else the server's exit status."""
        reader = threading.Thread(target=self._read, daemon=True)
        reader.start()
        threading.Thread(target=self._announce, daemon=True).start()
        try:
            while not self._stop.times and self._process.poll() is None:
                time.sleep(0.05)
            if self._stop.times:
                self._console.say("Stopping ...")
                self._process.terminate()
                deadline = time.monotonic() + OPEN_REQUESTS_S
                while self._process.poll() is None and self._stop.times < 2 and time.monotonic() < deadline:
                    time.sleep(0.05)
        finally:
            self._kill_group()
            reader.join(timeout=1)  # not for ever: a process that left the group may hold the pipe
            self._remove_files()
        status = self._process.wait()
        return 0 if self._stop.times else status if status >= 0 else 128 - status

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self._console.log(line.rstrip("\n"))

    def _announce(self) -> None:
        """Says where the server is and how set-up ended: nobody has to read that out of coglet's log."""
        start = time.monotonic()
        url = f"http://{_in_url(self._host)}:{self._port}"
        local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self._host, self._host)
        client = Client(f"http://{_in_url(local)}:{self._port}")
        announced = False
        while not self._stop.times and self._process.poll() is None:
            with contextlib.suppress(FailedError):
                health = client.health()
                if not announced:
                    self._console.say(f"Setting up {url} ...")
                    announced = True
                if health["status"] == "SETUP_FAILED":
                    reason = sentence(health.get("setup", {}).get("logs", ""))
                    self._console.say(
                        f"Setup failed: {reason} (The server stays up to say so; Ctrl-C stops it.)"
                    )
                    return
                if health["status"] in ("READY", "BUSY"):
                    self._console.say(
                        f"Ready after {time.monotonic() - start:.1f} s: {url} (Ctrl-C stops it)"
                    )
                    return
            time.sleep(0.1)

    def _kill_group(self) -> None:
        deadline = time.monotonic() + GROUP_END_S
        while time.monotonic() < deadline:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):  # the second is macOS for: only zombies
                return
            self._process.poll()
            time.sleep(0.02)

    def _remove_files(self) -> None:
        self._folder.remove()
        for prediction in self._console.predictions:
            # Clients choose ids: never follow one elsewhere.
            folder = COGLET_FOLDER / prediction
            if folder.parent == COGLET_FOLDER and folder.name != "..":
                shutil.rmtree(folder, ignore_errors=True)


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/serve",
        description="Cog's server in the foreground. Variables: HOST (127.0.0.1), PORT (5000), COG_WEIGHTS, "
        "LOG_FORMAT (console; json: Cog's own lines) and the settings in the README.",
        epilog="Ends with 0 when stopped by Ctrl-C, SIGTERM or POST /shutdown, else with Cog's exit status.",
    )
    parser.add_argument("--upload-url", help="where Cog puts outputs, instead of into the reply")
    parser.add_argument("--stop-at-eof", action="store_true", help="stop when standard input ends")
    arguments = parser.parse_args()
    wanted_port = os.environ.get("PORT") or "5000"
    if not (wanted_port.isdecimal() and int(wanted_port) <= 65535):
        sys.exit(f"PORT is {wanted_port!r}; it must be a number from 0 (any that is free) to 65535.")
    host, port = address(os.environ.get("HOST") or "127.0.0.1", int(wanted_port))
    check_coglet_folder()
    place_schema(ROOT / ".cog")
    console = Console(sys.stdout, raw=os.environ.get("LOG_FORMAT", "console") == "json")
    stop = StopRequest()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    if arguments.stop_at_eof:  # whoever started us is gone, however that came

        def wait() -> None:
            sys.stdin.read()
            stop()

        threading.Thread(target=wait, daemon=True).start()
    more = ["--upload-url", arguments.upload_url] if arguments.upload_url else []
    return Server(host, port, more, console, stop).run()


if __name__ == "__main__":
    sys.exit(main())
