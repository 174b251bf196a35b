"""`scripts/bench_load`: compares how audiocraft's `get_pretrained` and our loader load a full-size `small`.

    scripts/bench_load --json result.json

Both sides load the same files, in turn: a language model in fp16 and in fp32, its codec, and T5. Each load
runs in its own process. The process first loads tiny models in the same way, so that the time for imports,
which both sides need, is not measured. Then it loads the full-size models, from files in the page cache.
Meanwhile this process watches the anonymous memory of the other: memory that no file backs, and that the
system therefore cannot reclaim. `touched_s` adds the time to read every weight once and to finish the work in
the background, because the first request must wait for what loading postpones.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.load_files import DTYPES, read_all, weights_folder

SIDES = ("audiocraft", "ours")
POLL_S = 0.002
GB = 1e9


@dataclass(frozen=True)
class Load:
    """One load in one process."""

    seconds: float
    touched_s: float
    """Seconds of loading, of reading every weight, and of the work in the background."""
    weights_gb: float
    """Weights of all modules, in their final dtypes."""
    peak_gb: float
    """Greatest growth of anonymous memory while loading."""
    final_gb: float
    """Growth of anonymous memory after loading."""


@dataclass
class Row:
    """The results of one file. The lists have one entry per pair of loads."""

    files: str
    audiocraft: list[Load] = field(default_factory=list)
    ours: list[Load] = field(default_factory=list)

    def ratio(self, what: str = "seconds") -> list[float]:
        """audiocraft's value over ours, for each pair of loads."""
        pairs = zip(self.audiocraft, self.ours, strict=True)
        return [getattr(theirs, what) / getattr(own, what) for theirs, own in pairs]


def main() -> int:
    """Runs the benchmark, or one load as a child process. Returns the exit status."""
    args = arguments()
    if args.child:
        side, weights, name = args.child
        load_once(side, Path(weights), name)
        return 0
    from benchmarks.report import machine

    rows = [Row(files) for files in DTYPES]
    with weights_folder(args.folder) as weights:
        for _ in range(args.pairs):
            for row in rows:
                read_all(weights / row.files, weights / "t5-base")
                for side in SIDES:
                    getattr(row, side).append(measured(side, weights, row.files))
    result = {
        "model": "small",
        **machine(torch.device("cpu")),
        "rows": [
            asdict(row) | {"ratio": row.ratio(), "ratio_touched": row.ratio("touched_s")} for row in rows
        ],
    }
    show(result, rows)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3, help="of loads, audiocraft's and ours (default: 3)")
    parser.add_argument("--folder", type=Path, help="keep the 4 GB of files here, and use them the next time")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def measured(side: str, weights: Path, name: str) -> Load:
    """Loads in another process, and watches its memory.

    Args:
        side: which of SIDES loads.
        weights: the folder of all weights.
        name: which of DTYPES is loaded.
    """
    command = [sys.executable, "-m", "benchmarks.load", "--child", side, os.fspath(weights), name]
    # In the folder of the weights, where audiocraft finds T5 by its name.
    with subprocess.Popen(
        command, cwd=weights, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"},
    ) as process:  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n", f"{side} did not load the tiny model"
            before = peak = anonymous(process.pid)
            print(file=process.stdin, flush=True)
            os.set_blocking(process.stdout.fileno(), False)
            while not (line := process.stdout.readline()):
                assert process.poll() is None, f"{side} did not load {name}"
                peak = max(peak, anonymous(process.pid))
                time.sleep(POLL_S)
            final = anonymous(process.pid)
            os.set_blocking(process.stdout.fileno(), True)
            print(file=process.stdin, flush=True)
            touched = json.loads(process.stdout.readline())
        finally:
            process.stdin.close()
    seconds = json.loads(line)["seconds"]
    return Load(
        seconds=seconds,
        touched_s=seconds + touched["seconds"],
        weights_gb=touched["bytes"] / GB,
        peak_gb=(max(peak, final) - before) / GB,
        final_gb=(final - before) / GB,
    )


def anonymous(pid: int) -> int:
    """Bytes of a process's resident memory that no file backs."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def load_once(side: str, weights: Path, name: str) -> None:
    """Loads, in the process that is watched, and prints the results as two lines of JSON.

    It waits for a line on standard input before each of them.
    """
    load = {"audiocraft": load_with_audiocraft, "ours": load_with_ours}[side]
    load(weights, "small")
    gc.collect()
    print("ready", flush=True)
    sys.stdin.readline()
    loaded, seconds = timed(lambda: load(weights, name))
    print(json.dumps({"seconds": seconds}), flush=True)
    sys.stdin.readline()
    tensors = weights_of_all_modules()
    _, seconds = timed(lambda: touch(tensors, loaded))
    print(json.dumps({"seconds": seconds, "bytes": sum(tensor.nbytes for tensor in tensors)}), flush=True)


def load_with_audiocraft(weights: Path, name: str) -> Any:
    """Loads with audiocraft. Returns its model."""
    import musicgen_svc.audiocraft_compat  # noqa: F401, I001  what audiocraft needs to import here
    from audiocraft.models.musicgen import MusicGen

    return MusicGen.get_pretrained(os.fspath(weights / name), device="cpu")


def load_with_ours(weights: Path, name: str) -> Any:
    """Loads as the service does at its start. Returns the loader and the model."""
    from musicgen_svc.loading.loader import Loader
    from musicgen_svc.settings import Settings
    from musicgen_svc.weights.catalog import read_catalog
    from musicgen_svc.weights.paths import Weights

    loader = Loader(
        Weights.at(weights, read_catalog(), os.fspath(weights / name)), torch.device("cpu"), Settings()
    )
    return loader, loader.start()


def touch(tensors: list[torch.Tensor], loaded: Any) -> None:
    """Reads every weight once, and waits for the work that our loader does in the background.

    This work is the hash of the file, which the first request needs at its end.
    """
    for tensor in tensors:
        tensor.sum()
    if isinstance(loaded, tuple):
        assert loaded[1].content_hash


def timed[T](run: Callable[[], T]) -> tuple[T, float]:
    """Runs a function and returns its result and the seconds that it took."""
    start = time.perf_counter()
    result = run()
    return result, time.perf_counter() - start


def weights_of_all_modules() -> list[torch.Tensor]:
    """Finds the parameters and buffers of all modules in memory, each storage once."""
    gc.collect()
    modules = [thing for thing in gc.get_objects() if isinstance(thing, torch.nn.Module)]
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    return list({tensor.data_ptr(): tensor for tensor in tensors}.values())


def show(result: dict[str, Any], rows: list[Row]) -> None:
    """Prints the results."""
    print(f"small, torch {result['torch']}, {result['cpu']}, {result['threads']} threads")
    header = ("files", "", "seconds", "touched", "weights GB", "peak / weights", "final / weights")
    print("".join(f"{name:>18}" for name in header))
    for row in rows:
        weights_gb = row.audiocraft[0].weights_gb  # ours packs some weights, which then no module holds
        for side in SIDES:
            loads: list[Load] = getattr(row, side)
            cells = (
                row.files,
                side,
                f"{statistics.median(load.seconds for load in loads):.2f}",
                f"{statistics.median(load.touched_s for load in loads):.2f}",
                f"{weights_gb:.2f}",
                f"{max(load.peak_gb for load in loads) / weights_gb:.2f}",
                f"{max(load.final_gb for load in loads) / weights_gb:.2f}",
            )
            print("".join(f"{cell:>18}" for cell in cells))
        for what in ("seconds", "touched_s"):
            ratio = row.ratio(what)
            print(
                f"{row.files}, {what}: {min(ratio):.1f} / {statistics.median(ratio):.1f} / {max(ratio):.1f}"
            )


if __name__ == "__main__":
    sys.exit(main())
