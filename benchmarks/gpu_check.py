"""`scripts/gpu_check`: measures on a GPU what this service is for, and runs the tests that need a GPU.

    scripts/gpu_check quick            the figures that matter most, in less than 3 minutes
    scripts/gpu_check                  these and all other rows of benchmarks
    scripts/gpu_check tests            the tests marked `cuda`
    scripts/gpu_check quick --device cpu --folder FOLDER     tries the command, with tiny models

Each row is a file in the folder, and runs in its own process with its own time limit. A row whose file
exists is not run again; delete the file to repeat it. If a row fails or its time is over, what it has written
is in NAME.failed.*, the other rows run nevertheless, and the exit status is 1. A row also fails below the
gates of `gates.py`, which depend on the name of the GPU.

On a machine that has its own PyTorch and no network, `packages.py` has the list of what it needs. Where there
is a network, this makes wheels of what that machine lacks:

    python3 -m benchmarks.packages | python3 -m pip wheel --no-deps --wheel-dir WHEELS -r /dev/stdin

and there they are installed beside its own packages:

    python3 -m pip install --no-index --no-deps --target SITE WHEELS/*.whl
    MUSICGEN_NO_VENV=1 MUSICGEN_PYTHON=python3 PYTHONPATH=SITE scripts/gpu_check quick
"""

import argparse
import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import gates, packages
from benchmarks.bounds import Bound

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
QUICK_S = 165.0
"""How long all rows of `quick` may take together."""
STOP_S = 10.0
"""How long a row that has run out of time may take to stop its server, before it is killed."""


@dataclass(frozen=True)
class Row:
    """A command that writes one file, whose path is its last argument."""

    name: str
    limit_s: float
    """How long it may take, on a machine on which audiocraft makes 20 steps a second with `large`."""
    command: tuple[str, ...]
    """Arguments of Python."""
    suffix: str = ".json"


class Rows:
    """Makes the rows for one device."""

    def __init__(self, device: str, rate: float | None) -> None:
        """Makes rows with tiny models and more time for `device` "cpu".

        Args:
            device: "cuda" or "cpu".
            rate: scales the gates; None: there are none.
        """
        self._rate = rate
        self._patience = 1 if device == "cuda" else 4
        tiny = () if device == "cuda" else ("--tiny",)
        self._device = ("--device", device, *tiny)
        self._lengths = (
            "--seconds 30 --audiocraft-seconds 2 --pairs 2" if device == "cuda" else "--seconds 0.4 --pairs 1"
        ).split()

    def quick(self) -> list[Row]:
        """The rows of `quick`, the most telling first."""
        small, large = (gates.decode_bounds(model, self._rate) for model in ("small", "large"))
        songs = gates.at_least(Bound("song", gates.SONGS, "text"))
        return [
            self._decode("small", 60, "--model small --slots 1,16 --engine-only", small),
            self._latency("small", 60),
            self._decode("large", 80, "--model large --slots 1,16 --engine-only --pairs 1", large),
            self._row("songs", 60, "demo", "--rows", "text", *songs),
        ]

    def rest(self) -> list[Row]:
        """All other rows of benchmarks."""
        medium = gates.decode_bounds("medium", self._rate)
        plain = gates.without_kernels_bounds(self._rate)
        return [
            self._decode("medium", 150, "--model medium --slots 1,16 --engine-only", medium),
            self._decode("melody", 150, "--model melody --slots 1,16 --engine-only"),
            self._decode("small-slots", 150, "--model small --slots 2,4,8 --engine-only"),
            self._decode("large-slots", 200, "--model large --slots 2,4,8 --engine-only --pairs 1"),
            self._decode("small-int8", 150, "--model small --slots 1,16 --engine-only --precision int8"),
            self._decode("large-int8", 150, "--model large --slots 1,16 --engine-only --precision int8"),
            self._decode(
                "small-no-kernels", 200, "--model small --slots 1,16 --engine-only --kernels off", plain
            ),
            self._decode(
                "small-no-graphs", 150, "--model small --slots 1 --engine-only --graphs off --pairs 1"
            ),
            self._decode("small-beside", 300, "--model small --slots 1 --vs transformers --mbd"),
            self._latency("medium", 150),
            self._latency("large", 200),
        ]

    def tests(self) -> list[Row]:
        """The tests that need a GPU."""
        files = [path for path in (ROOT / "tests").rglob("test_*.py") if "mark.cuda" in path.read_text()]
        names = sorted(str(path.relative_to(ROOT)) for path in files)
        options = ("-m", "cuda", "-p", "pytest_timeout", "--junitxml")
        return [Row("tests", 400, ("-m", "pytest", *names, *options), ".xml")]

    def _decode(self, name: str, limit_s: float, options: str, bounds: Sequence[str] = ()) -> Row:
        """Measures decoding, as `scripts/bench` with these options."""
        return self._row(name, limit_s, "decode", *self._device, *self._lengths, *options.split(), *bounds)

    def _latency(self, model: str, limit_s: float) -> Row:
        """Measures the server with a model."""
        bounds = gates.latency_bounds(model, self._rate)
        return self._row(f"latency-{model}", limit_s, "latency", "--model", model, *self._device, *bounds)

    def _row(self, name: str, limit_s: float, module: str, *options: str) -> Row:
        """Runs a module of the benchmarks."""
        return Row(name, self._patience * limit_s, ("-m", f"benchmarks.{module}", *options, "--json"))


def main() -> int:
    """Runs the command. Returns the exit status."""
    began_s = time.monotonic()
    args = arguments()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # stops the row, too
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    name = device_name(args.device)
    if name is None:
        print("No GPU can be used here.", file=sys.stderr)
        return 1
    rate = gates.rate(name) if args.device == "cuda" else None
    print(
        f"{name}: " + ("there are no gates for it." if rate is None else f"the gates are x {rate:g}."),
        flush=True,
    )
    if lacking := packages.missing():
        print(f"What needs these packages will fail: {', '.join(lacking)}.", flush=True)
    rows = Rows(args.device, rate)
    chosen = rows.tests() if args.part == "tests" else rows.quick()
    if args.part is None:
        chosen += rows.rest()
    end_s = began_s + QUICK_S if (args.part, args.device) == ("quick", "cuda") else math.inf
    args.folder.mkdir(parents=True, exist_ok=True)
    failed = [row.name for row in chosen if not run(row, args.folder, end_s)]
    print(f"{time.monotonic() - began_s:.0f} s in all.")
    print(f"Failed: {' '.join(failed)}" if failed else f"Every row is in {args.folder}.")
    return 1 if failed else 0


def arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_check", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "part", nargs="?", choices=("quick", "tests"), help="all rows of benchmarks without it"
    )
    parser.add_argument(
        "--folder", type=Path, default=RESULTS, help="for the files of the rows (default: %(default)s)"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: with tiny models")
    return parser.parse_args()


def device_name(device: str) -> str | None:
    """Returns the name of the GPU, or "cpu". None: PyTorch finds no GPU that it can use."""
    if device == "cpu":
        return "cpu"
    asked = [sys.executable, "-c", "import torch; print(torch.cuda.get_device_name())"]
    ended = subprocess.run(asked, stdout=subprocess.PIPE, text=True, check=False)
    return ended.stdout.strip() if ended.returncode == 0 else None


def run(row: Row, folder: Path, end_s: float) -> bool:
    """Runs a row, unless its file exists.

    Args:
        row: what is run.
        folder: of the files.
        end_s: when it must have ended, on the clock of `time.monotonic`.

    Returns:
        bool: whether the file exists now.
    """
    file, failure = (folder / f"{row.name}{middle}{row.suffix}" for middle in ("", ".failed"))
    if file.exists():
        print(f"--- {row.name}: {file} exists", flush=True)
        return True
    began_s = time.monotonic()
    limit_s = min(row.limit_s, end_s - began_s)
    print(f"--- {row.name}, at most {max(limit_s, 0):.0f} s", flush=True)
    unfinished = file.with_name(f"{file.name}.part")
    for old in (unfinished, failure):
        old.unlink(missing_ok=True)
    problem = (
        "no time was left"
        if limit_s <= 0
        else failed([sys.executable, *row.command, str(unfinished)], limit_s)
    )
    if unfinished.exists():
        unfinished.replace(failure if problem else file)
    elif not problem:
        problem = "it wrote no file"
    print(f"--- {row.name}: {problem or 'done'} after {time.monotonic() - began_s:.0f} s", flush=True)
    return not problem


def failed(command: list[str], limit_s: float) -> str | None:
    """Runs a command in a process group of its own, which is stopped after the limit.

    Returns:
        str: why it failed. None: it did not.
    """
    # Other plugins of pytest that the machine has are not loaded, because their warnings would be errors.
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, process_group=0)
    try:
        status = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        return "its time was over"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return f"it ended with status {status}" if status else None


if __name__ == "__main__":
    sys.exit(main())
