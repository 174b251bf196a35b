"""`scripts/bench`: compares the speed and the tokens of audiocraft's decoding loop and ours, in one process.

    scripts/bench --model small --seconds 10 --slots 1,4 --device cpu --json result.json
    scripts/bench --model small --vs transformers --mbd

The model has its real size and random weights, rounded to float16 as the released ones are stored, so
that nothing is downloaded. After a warm-up each pair runs audiocraft first and the engine last, so that
other work of the machine slows both; ratios are taken within pairs. On a CPU in `reference` and in
`float16` precision the tokens must be equal, or the command fails. On a GPU the draws differ, and the
likeliest token must nearly always be the same.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from benchmarks.agreement import LEAST_TOP1, with_audiocraft, with_reference
from benchmarks.beside import beside
from benchmarks.growth import growth
from benchmarks.launches import per_step
from benchmarks.random_models import SIZES, conditions, language_model
from benchmarks.report import FRAME_RATE_HZ, Row, machine, peak_memory, show
from benchmarks.workload import GB, Workload, copy_bandwidth, stored_in_float16, timed
from musicgen_svc.engine.batch import Batch
from musicgen_svc.engine.factory import batch_for
from musicgen_svc.engine.projections import Precision
from musicgen_svc.engine.sampling_params import SamplingParams
from musicgen_svc.engine.static import CHUNK

FIGURES = ("steps", "ratio", "real-time")
"""What `--at-least` may name."""

EXACT: tuple[Precision, ...] = ("reference", "float16")
"""Precisions that give the same tokens, for weights that are stored in float16."""


@dataclass(frozen=True)
class Sides:
    """Everything that is compared, and its work."""

    ours: Workload
    theirs: Workload
    """The same work, perhaps with fewer frames."""
    batches: dict[int, Batch]
    """Number of slots -> the engine's batch."""
    transformers: Callable[[Workload], Tensor] | None
    """Decodes with transformers. None: not asked for."""


def main() -> int:
    """Runs the benchmark. Returns the exit status."""
    args = arguments()
    device = torch.device(args.device)
    sides = opposed(args, device)
    rows = [Row(n) for n in args.slots]
    copied = copy_bandwidth(device)
    few = sides.ours.of(4)
    few.audiocraft()
    if sides.transformers:
        sides.transformers(few)
    for n in args.slots:
        few.engine(sides.batches[n], n)
        if device.type == "cuda":  # records the graph of every length, as in a service that has run before
            sides.ours.engine(sides.batches[n], n)
    for _ in range(args.pairs):
        measure_pair(sides, rows, args.precision)
    look_closer(sides, rows, copied)

    missed = failures(rows, device, args)
    result = {
        "model": args.model,
        "seconds": args.seconds,
        "others_seconds": sides.theirs.frames / FRAME_RATE_HZ,
        "precision": args.precision,
        "graphs": args.graphs and device.type == "cuda",
        "kernels": all(getattr(batch, "path", "") == "kernels" for batch in sides.batches.values()),
        "sampling": asdict(sides.ours.sampling),
        **machine(device),
        "copy_gb_per_s": copied,
        "peak_gb": peak_memory(device),
        "rows": [row.as_json() for row in rows],
        "audiocraft_per_step": launches(lambda frames: sides.ours.of(frames).audiocraft(), device),
        "against_reference": with_reference(sides.ours, args.precision)
        if args.precision != "reference"
        else None,
        "beside": {} if args.engine_only else beside(args.seconds, device, mbd=args.mbd),
        "failed": missed,
    }
    show(result, rows)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    for sentence in missed:
        print(sentence, file=sys.stderr)
    return 1 if missed else 0


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
    parser.add_argument(
        "--graphs", action=argparse.BooleanOptionalAction, default=True, help="on a GPU (default: on)"
    )
    parser.add_argument(
        "--kernels", action=argparse.BooleanOptionalAction, default=True,
        help="on a GPU, our own where they work (default: on)",
    )  # fmt: skip
    parser.add_argument("--mbd", action="store_true", help="MultiBand Diffusion beside EnCodec and T5")
    parser.add_argument("--engine-only", action="store_true", help="leave out EnCodec and T5")
    parser.add_argument(
        "--at-least", action="append", type=bound, default=[], metavar="FIGURE=VALUE",
        help=f"fail where a median is less, of {', '.join(FIGURES)}; may be repeated",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json {args.json}: there is no folder {args.json.parent}")
    if args.vs and SIZES[args.model]["kind"] != "text":
        parser.error(f"--vs transformers: {args.model} was given, a model with text alone is expected")
    if args.mbd and args.engine_only:
        parser.error("--mbd and --engine-only were given, at most one of them is expected")
    return args


def numbers(text: str) -> list[int]:
    """Parses "1,4,16"."""
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise ValueError(text)
    return found


def bound(text: str) -> tuple[str, float]:
    """Parses "ratio=10"."""
    name, _, value = text.partition("=")
    if name not in FIGURES:
        raise ValueError(text)
    return name, float(value)


def opposed(args: argparse.Namespace, device: torch.device) -> Sides:
    """Makes one set of weights, and every side that decodes with it."""
    size = SIZES[args.model]
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    lm = stored_in_float16(language_model(**size, dtype=dtype, device=device))
    given = [
        {name: (tensor.to(device), mask.to(device)) for name, (tensor, mask) in c.items()}
        for c in (conditions(size["kind"], dim=size["dim"], seed=i) for i in range(max(args.slots)))
    ]
    sampling = SamplingParams(temperature=0 if args.greedy else 1)
    work = Workload(lm, given, round(args.seconds * FRAME_RATE_HZ), sampling, device)

    batch = batch_for(
        lm, slots=max(args.slots), precision=args.precision, graphs="on" if args.graphs else "off",
        kernels="auto" if args.kernels else "off",
    )  # fmt: skip
    return Sides(
        ours=work,
        theirs=work.of(round(min(args.audiocraft_seconds or args.seconds, args.seconds) * FRAME_RATE_HZ)),
        batches=dict.fromkeys(args.slots, batch),
        transformers=transformers_side(work) if args.vs else None,
    )


def transformers_side(work: Workload) -> Callable[[Workload], Tensor]:
    """Makes transformers' model of the same weights, and returns the function that decodes with it."""
    from transformers.utils import logging

    from benchmarks.transformers_generate import TransformersMusicgen

    logging.set_verbosity_error()  # it warns about a special token that the released models have
    model = TransformersMusicgen(work.lm)
    return lambda work: model.generate(work.given[0], length=work.frames, sampling=work.sampling, seed=0)


def measure_pair(sides: Sides, rows: list[Row], precision: Precision) -> None:
    """Measures audiocraft once, transformers if asked for, then the engine with each number of slots."""
    ours, theirs = sides.ours, sides.theirs
    expected, audiocraft_s = timed(theirs.audiocraft, ours.device)
    transformers_s = None
    if sides.transformers is not None:
        _, transformers_s = timed(partial(sides.transformers, theirs), ours.device)
    for row in rows:
        chunks_s: list[float] = []
        decode = partial(ours.engine, sides.batches[row.slots], row.slots, chunks_s)
        tokens, our_s = timed(decode, ours.device)
        row.audiocraft_steps_per_s.append(theirs.columns / audiocraft_s)
        if transformers_s is not None:
            row.transformers_steps_per_s.append(theirs.columns / transformers_s)
        row.engine_steps_per_s.append(ours.columns / our_s)
        row.gb_per_s.append(ours.bytes_per_step(row.slots, precision) * ours.columns / our_s / GB)
        row.chunks_s.append(chunks_s)
        row.tokens = compared(tokens[0], expected, ours)


def compared(tokens: Tensor, expected: Tensor, work: Workload) -> str:
    """Compares tokens in the frames that both sides have.

    Args:
        tokens: [K, T] of the engine.
        expected: [K, T' <= T] of audiocraft.
        work: of the engine.

    Returns:
        str: a few words for the table.
    """
    if work.device.type == "cuda" and work.sampling.temperature > 0:
        return "drawn otherwise"
    frames = expected.shape[1]
    if frames < work.frames:  # the last frames depend on the end, which the longer piece does not have there
        frames -= work.longest_delay
    differs = (tokens[:, :frames] != expected[:, :frames]).any(dim=0).nonzero()
    return "equal" if len(differs) == 0 else f"differ from frame {int(differs[0])}"


def look_closer(sides: Sides, rows: list[Row], copy_gb_per_s: float) -> None:
    """Measures everything but speed: growth of a step, launches, agreement."""
    ours = sides.ours
    for row in rows:
        batch = sides.batches[row.slots]
        position_s = ours.bytes_per_position(row.slots) / copy_gb_per_s / GB
        row.growth = growth(row.chunks_s, CHUNK, position_s)
        row.per_step = launches(partial(decode_frames, ours, batch, row.slots), ours.device)
        if ours.device.type == "cuda":
            row.agreement = with_audiocraft(ours, batch)


def decode_frames(work: Workload, batch: Batch, slots: int, frames: int) -> list[Tensor]:
    """Decodes this many frames with the engine."""
    return work.of(frames).engine(batch, slots)


def launches(run: Callable[[int], object], device: torch.device) -> dict[str, float] | None:
    """Counts launches of one step of `run(frames)`. None: the device is no GPU."""
    return per_step(run) if device.type == "cuda" else None


def failures(rows: list[Row], device: torch.device, args: argparse.Namespace) -> list[str]:
    """Lists what does not meet the expectations, one sentence each."""
    found = []
    for row in rows:
        if args.precision in EXACT:
            if device.type == "cpu" and row.tokens != "equal":
                found.append(
                    f"With {row.slots} slot(s) the engine's tokens are not audiocraft's: {row.tokens}."
                )
            if row.agreement is not None and row.agreement.top1 < LEAST_TOP1:
                found.append(
                    f"With {row.slots} slot(s) {row.agreement.top1:.1%} of the likeliest tokens are "
                    f"audiocraft's, at least {LEAST_TOP1:.0%} were expected."
                )
        found += [
            f"With {row.slots} slot(s) the median of {name} is {row.figures[name]:.4g}, "
            f"at least {least:g} was expected."
            for name, least in args.at_least
            if row.figures[name] < least
        ]
    return found


if __name__ == "__main__":
    sys.exit(main())
