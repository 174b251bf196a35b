"""`scripts/bench`: compares the speed and the tokens of audiocraft's decoding loop and ours, in one process.

    scripts/bench --model small --seconds 10 --slots 1,4 --device cpu --json result.json
    scripts/bench --model small --vs transformers --mbd

The model has its real size and random weights, rounded to float16 as the released ones are stored, so
that nothing is downloaded. After a warm-up each pair runs audiocraft first and the engine last, so that
other work of the machine slows both; ratios are taken within pairs. Each figure is printed, and the file of
results written, as soon as it is known. On a CPU in `reference` and in `float16` precision the tokens must
be equal, or the command fails. On a GPU the draws differ, and the likeliest token must nearly always be the
same.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import torch

from benchmarks.agreement import LEAST_TOP1, likeliest, with_audiocraft, with_reference
from benchmarks.beside import RELEASED, TINY, beside
from benchmarks.bounds import missed, parsed, refuse_unknown_rows
from benchmarks.growth import growth
from benchmarks.launches import per_step, step_profile
from benchmarks.random_models import SIZES
from benchmarks.report import FRAME_RATE_HZ, Report, Row, machine, peak_memory, show
from benchmarks.sides import Sides, measure_pair, opposed
from benchmarks.workload import GB, copy_bandwidth
from musicgen_svc.engine.factory import Switch
from musicgen_svc.engine.projections import Precision
from musicgen_svc.engine.static import CHUNK

FIGURES = ("steps", "ratio", "real-time", "growth")
"""What `--at-least` and `--at-most` may name."""

EXACT: tuple[Precision, ...] = ("reference", "float16")
"""Precisions that give the same tokens, for weights that are stored in float16."""


def main() -> int:
    """Runs the benchmark. Returns the exit status."""
    args = arguments()
    device = torch.device(args.device)
    sides = opposed(args)
    rows = [Row(n, args.model) for n in args.slots]
    head = {
        "model": args.model,
        "seconds": args.seconds,
        "others_seconds": sides.theirs.frames / FRAME_RATE_HZ,
        "precision": args.precision,
        "graphs": args.graphs,
        "kernels": args.kernels,
        "path": sides.path,
        "sampling": asdict(sides.ours.sampling),
        **machine(device),
        "copy_gb_per_s": copy_bandwidth(device),
    }
    report = Report(head, args.json, rows)
    sides.warm_up(rows)
    for _ in range(args.pairs):
        measure_pair(sides, rows, args.precision)
        report.save(peak_gb=peak_memory(device))
    look_closer(sides, report)
    if args.precision != "reference":
        report.save(against_reference=with_reference(sides.ours, args.precision))
    if not args.engine_only:
        if device.type == "cuda":
            report.save(audiocraft_per_step=per_step(lambda frames: sides.ours.of(frames).audiocraft()))
        report.save(beside=beside(args.seconds, device, TINY if args.tiny else RELEASED, mbd=args.mbd))

    failed = failures(rows, device, args)
    report.save(failed=failed)
    show(report.head, rows)
    for sentence in failed:
        print(sentence, file=sys.stderr)
    return 1 if failed else 0


def arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="small")
    parser.add_argument("--seconds", type=float, default=10, help="of audio, at most 30 (default: 10)")
    parser.add_argument(
        "--audiocraft-seconds", type=float, metavar="SECONDS",
        help="of audio that the other sides decode; only steps are compared (default: as many)",
    )  # fmt: skip
    parser.add_argument(
        "--slots", type=numbers, default=[1], help="requests at once, as 1,4,16 (default: 1)", metavar="N,..."
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=get_args(Precision), default="reference")
    parser.add_argument("--vs", choices=("transformers",), help="beside audiocraft, in the same pairs")
    parser.add_argument("--pairs", type=int, default=3, help="of runs, audiocraft's and ours (default: 3)")
    parser.add_argument("--greedy", action="store_true", help="the most likely token, no draw")
    for option, meaning in (("graphs", "MUSICGEN_CUDA_GRAPHS"), ("kernels", "MUSICGEN_GPU_KERNELS")):
        parser.add_argument(
            f"--{option}", choices=get_args(Switch), default="auto", help=f"as {meaning} (default: auto)"
        )
    parser.add_argument("--mbd", action="store_true", help="MultiBand Diffusion beside EnCodec and T5")
    parser.add_argument(
        "--engine-only", action="store_true", help="leave out EnCodec, T5 and the launches of audiocraft"
    )
    parser.add_argument("--tiny", action="store_true", help="few and narrow layers, to try the command")
    for option, limit in (("--at-least", "less"), ("--at-most", "more")):
        parser.add_argument(
            option, action="append", type=lambda text: parsed(text, FIGURES), default=[],
            metavar="FIGURE[@SLOTS]=VALUE",
            help=f"fail where a median is {limit}, of {', '.join(FIGURES)}; may be repeated",
        )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json {args.json}: there is no folder {args.json.parent}")
    if args.vs and SIZES[args.model]["kind"] != "text":
        parser.error(f"--vs transformers: {args.model} was given, a model with text alone is expected")
    if args.mbd and args.engine_only:
        parser.error("--mbd and --engine-only were given, at most one of them is expected")
    refuse_unknown_rows(parser, (*args.at_least, *args.at_most), map(str, args.slots))
    return args


def numbers(text: str) -> list[int]:
    """Parses "1,4,16"."""
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise ValueError(text)
    return found


def look_closer(sides: Sides, report: Report) -> None:
    """Measures everything but speed: growth of a step, and on a GPU its kernels and its agreement."""
    ours, batch, on_gpu = sides.ours, sides.batch, sides.ours.device.type == "cuda"
    for row in report.rows:
        position_s = ours.bytes_per_position(row.slots) / report.head["copy_gb_per_s"] / GB
        row.growth = growth(row.chunks_s, CHUNK, position_s)
        row.profile = step_profile(ours, batch, row.slots) if on_gpu else None
        for line in row.closer:
            print(line, flush=True)
        report.save()
    if not on_gpu:
        return
    expected = likeliest(ours)
    for row in report.rows:
        row.agreement = with_audiocraft(ours, batch, row.slots, expected)
        report.save()


def failures(rows: list[Row], device: torch.device, args: argparse.Namespace) -> list[str]:
    """Lists what does not meet the expectations, one sentence each."""
    found = []
    for row in rows:
        with_slots = f"With {row.slots} slot(s)"
        if args.precision in EXACT:
            if device.type == "cpu" and row.tokens != "equal":
                found.append(f"{with_slots} the engine's tokens are not audiocraft's: {row.tokens}.")
            if row.agreement is not None and row.agreement.top1 < LEAST_TOP1:
                found.append(
                    f"{with_slots} {row.agreement.top1:.1%} of the likeliest tokens are audiocraft's, "
                    f"at least {LEAST_TOP1:.0%} were expected."
                )
        parts = missed(row.figures, str(row.slots), args.at_least, args.at_most)
        found += [f"{with_slots} the median of {part}." for part in parts]
    return found


if __name__ == "__main__":
    sys.exit(main())
