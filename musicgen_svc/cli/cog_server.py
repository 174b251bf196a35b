"""Starts and ends one Cog server: Cog's own process and its Python worker, in one process group."""

import asyncio
import contextlib
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from musicgen_svc.cli.cog_log import CogLog, Console
from musicgen_svc.cli.prediction_folders import PredictionFolders
from musicgen_svc.cli.reaper import Reaper, end_group
from musicgen_svc.runtime.json_object import Json
from musicgen_svc.runtime.machine import memory_bytes
from musicgen_svc.runtime.output_files import WorkFolder
from musicgen_svc.runtime.slots import slots_on_cpu, slots_on_gpu

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = ROOT / "openapi_schema.json"
PATHS = ("COG_WEIGHTS", "MUSICGEN_WEIGHTS_DIR", "MUSICGEN_WORK_DIR")
"""Settings that may hold a path relative to the current folder. The server runs in another folder."""
FILES_PER_PLACE, OTHER_FILES = 4, 256
"""Files that each of the processes keeps open at most for one prediction, and for everything else."""
WAITING = 64
"""How many predictions may wait for a slot, unless MUSICGEN_WAITING says otherwise."""
LINE_BYTES = 2**24
"""The longest line of Cog's log that is read. Cog cuts its lines at 4 MB."""
CANCEL_AGAIN_S = 1.0
"""How long a cancelled prediction may take to end before it is cancelled again."""
HEALTH_S = 12.0
"""How long a health check may take. Cog gives its worker 10 s."""


class CogServer:
    """A Cog server that runs. After `end` no process and no file of it is left."""

    def __init__(
        self, process: asyncio.subprocess.Process, variables: dict[str, str],
        reaper: Reaper, console: Console, folders: PredictionFolders, work: WorkFolder,
    ) -> None:  # fmt: skip
        self._process = process
        self._reaper = reaper
        self._work = work
        self._drain_file = Path(variables["MUSICGEN_DRAIN_FILE"])
        self.port = int(variables["PORT"])
        self.places = int(variables["COG_MAX_CONCURRENCY"])
        self.log = CogLog(console, folders.started, self._repeat_cancel, folders.finished)
        self.folders = folders
        self.was_ready = False
        self._cancelling: dict[str, asyncio.Task[None]] = {}
        self._reading = asyncio.create_task(self._read_log())

    @classmethod
    async def start(cls, more: list[str], console: Console) -> "CogServer":
        """Starts a server on the loopback device. `more`: further arguments for Cog."""
        reaper = Reaper()
        work = WorkFolder()
        reaper.watch_folder(work.path)
        folders = PredictionFolders(reaper)
        variables = environment(free_port(), work.new_temporary())
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "cog.server.http", "--host", "127.0.0.1", *more,
            cwd=ROOT,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            limit=LINE_BYTES,
            start_new_session=True,  # a process group that can be killed, and that Ctrl-C does not reach
        )  # fmt: skip
        reaper.watch_group(process.pid)
        return cls(process, variables, reaper, console, folders, work)

    @property
    def exit_status(self) -> int | None:
        """The exit status as a shell gives it. None: the server runs."""
        status = self._process.returncode
        return status if status is None or status >= 0 else 128 - status

    async def wait(self) -> None:
        """Waits until Cog's own process has ended."""
        await self._process.wait()

    async def health(self) -> Json | None:
        """Returns the health check's answer. None: there is none."""
        try:
            async with asyncio.timeout(HEALTH_S):
                answer = json.loads(await _ask(self.port, "GET", "/health-check"))
        except (OSError, ValueError, asyncio.IncompleteReadError):
            return None
        return answer if isinstance(answer, dict) else None

    def drain(self) -> None:
        """Makes the service refuse the requests that wait for others, and new ones. Those that run go on."""
        self._drain_file.touch()

    def stop(self) -> None:
        """Tells Cog to end when it has answered all clients."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    async def end(self) -> None:
        """Kills all processes of the server that still run, and removes its files."""
        await asyncio.to_thread(self._reaper.reap)
        await asyncio.to_thread(
            end_group, self._process.pid
        )  # again, because the reaper itself may have been killed
        await self._process.wait()
        with contextlib.suppress(TimeoutError):  # a process that left the group may keep the pipe open
            await asyncio.wait_for(self._reading, 1)
        self._work.remove()
        self.folders.clear()

    def _repeat_cancel(self, prediction: str) -> None:
        """Cancels a prediction again and again until it has ended.

        Cog 0.23.1 loses a cancel or a hang-up that comes within milliseconds of the prediction's start.
        """

        async def repeat() -> None:
            with contextlib.suppress(OSError):  # the server has ended, and the prediction with it
                await asyncio.sleep(CANCEL_AGAIN_S)
                while prediction in self.log.cancelled:
                    await _ask(self.port, "POST", f"/predictions/{prediction}/cancel")
                    await asyncio.sleep(CANCEL_AGAIN_S)
            del self._cancelling[prediction]

        if prediction not in self._cancelling:
            self._cancelling[prediction] = asyncio.create_task(repeat())

    async def _read_log(self) -> None:
        """Reads Cog's log until the pipe closes."""
        assert self._process.stdout
        while True:
            try:
                line = await self._process.stdout.readline()
            except ValueError:  # too long for a line that matters
                continue
            if not line:
                return
            self.log.line(line.decode(errors="replace").rstrip("\r\n"))


async def _ask(port: int, method: str, path: str) -> bytes:
    """Sends a request without a body to a server on the loopback device. Returns the body of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
        return (await reader.read()).partition(b"\r\n\r\n")[2]
    finally:
        writer.close()


def free_port() -> int:
    """Finds a free port of the loopback device."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def write_schema(folder: Path) -> None:
    """Copies the schema to the folder where Cog looks for it, unless an equal file is there.

    Raises:
        OSError: the file cannot be written.
    """
    target = folder / SCHEMA.name
    if target.is_file() and target.read_bytes() == SCHEMA.read_bytes():
        return
    folder.mkdir(exist_ok=True)
    temporary = folder / f"{SCHEMA.name}.{os.getpid()}"  # another server may be writing it at the same time
    shutil.copyfile(SCHEMA, temporary)
    temporary.replace(target)


def warning_filters() -> str:
    """The value of PYTHONWARNINGS that shows only the warnings of our modules. It has no wildcards."""
    files = sorted((ROOT / "musicgen_svc").rglob("*.py"))
    modules = [
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files
    ]
    return ",".join(["ignore", *(f"default:::{module}" for module in [*modules, "predict"])])


def environment(port: int, temporary: Path) -> dict[str, str]:
    """Makes the server's environment variables.

    Args:
        port: where Cog listens.
        temporary: its folder for temporary files.

    Returns:
        dict: defaults, overridden by the user's variables, overridden by what the server needs.
    """
    quiet = {
        "PYTHONWARNINGS": warning_filters(),
        "RUST_LOG": "warn,coglet::setup=info,coglet::user=info,coglet::prediction=info",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    fixed = {
        "COG_PREDICT_TYPE_STUB": "predict.py:Predictor",
        "HF_HUB_OFFLINE": "1",
        # Cog writes JSON, for CogLog, unless this is `console`. With `json` the service does so too.
        "LOG_FORMAT": "json" if os.environ.get("LOG_FORMAT") == "json" else "",
        "MUSICGEN_DRAIN_FILE": str(temporary / "drain"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",  # Cog runs `python`
        "PORT": str(port),
        "TMPDIR": str(temporary),
    }
    paths = {
        name: str(
            Path(os.environ[name]).absolute()
        )  # a link is not resolved, because files beside it may be meant
        for name in PATHS
        if os.environ.get(name) and Path(os.environ[name]).exists()
    }
    return quiet | os.environ | {"COG_MAX_CONCURRENCY": str(concurrency())} | paths | fixed


def concurrency() -> int:
    """Returns how many predictions Cog runs at once: those that decode, and those that wait for a slot.

    Raises:
        SystemExit: a variable is not a number.
    """
    if os.environ.get("COG_MAX_CONCURRENCY"):
        return _number("COG_MAX_CONCURRENCY", least=1)
    slots = _number("MUSICGEN_SLOTS", least=0) if os.environ.get("MUSICGEN_SLOTS") else 0
    waiting = _number("MUSICGEN_WAITING", least=0) if os.environ.get("MUSICGEN_WAITING") else WAITING
    return (slots or _slots()) + waiting


def allow_open_files(places: int) -> None:
    """Raises this process's limit of open files as far as so many predictions at once need it.

    Raises:
        SystemExit: the operator's limit is lower.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = OTHER_FILES + places * FILES_PER_PLACE
    if needed <= soft or soft == resource.RLIM_INFINITY:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        sys.exit(
            f"{places} predictions at once need {needed} open files, and the limit here is {hard}: lower "
            "MUSICGEN_WAITING or COG_MAX_CONCURRENCY, or raise the limit with ulimit -n."
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _number(name: str, least: int) -> int:
    """Reads a variable that must be a whole number."""
    text = os.environ[name]
    if not (text.isdecimal() and int(text) >= least):
        sys.exit(f"{name} is {text!r}; it must be a whole number from {least}.")
    return int(text)


def _slots() -> int:
    """Returns how many requests the smallest GPU decodes at once, or the CPU where there is no GPU.

    Set-up counts them again for the device that it uses.
    """
    if os.environ.get("MUSICGEN_DEVICE") != "cpu":
        try:  # torch would know too, but takes seconds to import
            shown = subprocess.run(
                ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"],
                capture_output=True, timeout=10,
            )  # fmt: skip
            return slots_on_gpu(min(int(line) for line in shown.stdout.splitlines()) * 2**20 / 1e9)
        except (OSError, subprocess.TimeoutExpired, ValueError):  # there is no NVIDIA GPU
            pass
    return slots_on_cpu(memory_bytes() / 1e9)
