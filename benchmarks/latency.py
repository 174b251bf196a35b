"""Measures the real server: seconds from sending a request to having its file, for a model of the real size.

    python -m benchmarks.latency --model small --device cuda --json latency-small.json

The server is the one that `scripts/serve` starts, and loads a checkpoint with random weights in audiocraft's
format. The first request of each length is measured apart from those after it.
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import soundfile
import torch

from benchmarks.bounds import missed, parsed, refuse_unknown_rows
from benchmarks.load_files import ROOT, codec_package, lm_package, save_checkpoint, save_t5
from benchmarks.random_models import SIZES
from benchmarks.report import Report, machine
from musicgen_svc.cli import output
from musicgen_svc.cli.client import Client, succeeded
from musicgen_svc.cli.own_server import own_server

FIGURES = ("seconds", "first")
"""What `--at-most` may name, with the seconds of audio: the median of the requests after the first, and the
first one's time over it."""
LENGTHS_S, TINY_LENGTHS_S = (8, 30), (1, 2)
FRAME_S = 0.02
"""Seconds of audio in one frame of the codec: how exact the length of a file is."""


def main() -> int:
    """Runs the benchmark. Returns the exit status."""
    args = arguments()
    report = Report({"model": args.model, "tiny": args.tiny, **machine(torch.device(args.device))}, args.json)
    failed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="musicgen-bench-") as folder:
        began = time.perf_counter()
        checkpoint = (
            tiny_checkpoint() if args.tiny else random_checkpoint(Path(folder), args.model, args.device)
        )
        say(report, f"checkpoint written in {time.perf_counter() - began:.1f} s")
        with server(checkpoint, args.device) as client:
            began = time.perf_counter()
            client.await_ready()
            say(
                report,
                f"server ready after {time.perf_counter() - began:.1f} s",
                setup_s=time.perf_counter() - began,
            )
            for seconds in args.lengths:
                times_s = [request_s(client, seconds, Path(folder)) for _ in range(1 + args.repeat)]
                figures = {
                    "seconds": statistics.median(times_s[1:]),
                    "first": times_s[0] / statistics.median(times_s[1:]),
                }
                say(
                    report,
                    f"{seconds} s of audio: first request {times_s[0]:.3f} s, then "
                    + ", ".join(f"{each:.3f} s" for each in times_s[1:]),
                    **{f"{seconds}_s": {"requests_s": times_s, **figures}},
                )
                parts = missed(figures, str(seconds), [], args.at_most)
                failed += [f"With {seconds} s of audio {part}." for part in parts]
    report.save(failed=failed)
    for sentence in failed:
        print(sentence, file=sys.stderr)
    return 1 if failed else 0


def arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    texts = [name for name, size in SIZES.items() if size["kind"] == "text"]
    parser.add_argument("--model", choices=texts, default="small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeat", type=int, default=2, help="requests after the first (default: 2)")
    parser.add_argument("--tiny", action="store_true", help="a tiny checkpoint, to try the command")
    parser.add_argument(
        "--at-most", action="append", type=lambda text: parsed(text, FIGURES), default=[],
        metavar="FIGURE@SECONDS=VALUE", help=f"fail where a figure is more, of {', '.join(FIGURES)}",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    args.lengths = TINY_LENGTHS_S if args.tiny else LENGTHS_S
    refuse_unknown_rows(parser, args.at_most, map(str, args.lengths))
    return args


def say(report: Report, line: str, **more: Any) -> None:
    """Prints a line and adds entries to the file of results."""
    print(f"{report.head['model']}: {line}", flush=True)
    report.save(**more)


def random_checkpoint(folder: Path, model: str, device: str) -> Path:
    """Writes a checkpoint in fp16 with T5 beside it. Returns its path."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    save_t5(folder / "t5-base", device)
    save_checkpoint(folder / model, lm_package(model, torch.float16, device), codec_package())
    if device == "cuda":
        torch.cuda.empty_cache()  # the server needs the memory
    return folder / model


def tiny_checkpoint() -> Path:
    """Returns the path of a tiny checkpoint with T5 beside it."""
    from tests.fixtures import tiny_weights

    folder: Path = tiny_weights.ensure(ROOT)
    return folder / "small"


@contextlib.contextmanager
def server(checkpoint: Path, device: str) -> Iterator[Client]:
    """Context manager of a server whose model `finetuned` is a checkpoint."""
    os.environ |= {
        "COG_WEIGHTS": str(checkpoint),
        "MUSICGEN_WEIGHTS_DIR": str(checkpoint.parent),
        "MUSICGEN_DEVICE": device,
    }
    with own_server() as client:
        yield client


def request_s(client: Client, seconds: int, folder: Path) -> float:
    """Sends a request, and returns the seconds until its audio is a file, whose length is then checked."""
    fields = {"prompt": "a calm piano piece", "duration": seconds, "seed": 1}
    start = time.perf_counter()
    answer = client.call("POST", "/predictions", {"input": fields}, timeout_s=None).json()
    body, suffix = output.fetch(succeeded(answer)["output"])
    file = output.save(body, suffix, folder / f"output{suffix}")
    elapsed_s = time.perf_counter() - start
    found_s = soundfile.info(file).duration
    assert abs(found_s - seconds) <= FRAME_S, (
        f"{found_s} s of audio were returned, {seconds} s were asked for"
    )
    return elapsed_s


if __name__ == "__main__":
    sys.exit(main())
