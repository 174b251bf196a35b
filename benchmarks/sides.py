"""What `scripts/bench` compares: audiocraft, transformers and the engine, with one set of weights."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.random_models import SIZES, TINY_SIZES, conditions, language_model
from benchmarks.report import FRAME_RATE_HZ, Row
from benchmarks.workload import GB, Workload, stored_in_float16, timed
from musicgen_svc.engine.batch import Batch
from musicgen_svc.engine.factory import batch_for
from musicgen_svc.engine.projections import Precision
from musicgen_svc.engine.sampling_params import SamplingParams
from musicgen_svc.engine.static import StaticBatch

WARM_UP_FRAMES = 4


@dataclass(frozen=True)
class Sides:
    """Everything that is compared, and its work."""

    ours: Workload
    theirs: Workload
    """The same work, perhaps with fewer frames."""
    batch: Batch
    """The engine's, with the greatest number of slots."""
    transformers: Callable[[Workload], Tensor] | None
    """Decodes with transformers. None: not asked for."""

    @property
    def path(self) -> str:
        """Whether the engine decodes with kernels of its own: "kernels" or "plain"."""
        return str(getattr(self.batch, "path", "plain"))

    @property
    def recordings(self) -> int:
        """How many CUDA graphs the engine has recorded."""
        return len(self.batch.graphed.recordings) if isinstance(self.batch, StaticBatch) else 0

    def warm_up(self, rows: list[Row]) -> None:
        """Compiles the engine's steps, and decodes a few frames with every side."""
        few = self.ours.of(WARM_UP_FRAMES)
        few.audiocraft()
        if self.transformers is not None:
            self.transformers(few)
        for row in rows:
            self.batch.prepare(row.slots)
            few.engine(self.batch, row.slots)

    def engine(self, slots: int) -> tuple[list[Tensor], float, list[float]]:
        """Measures the engine. A decode in which it has recorded a graph is not counted, but repeated.

        Returns:
            tuple: [K, frames] tokens of each request, seconds, and the seconds of each chunk of steps.
        """
        before = self.recordings
        measured = self._engine(slots)
        return measured if self.recordings == before else self._engine(slots)

    def _engine(self, slots: int) -> tuple[list[Tensor], float, list[float]]:
        """Measures the engine once, as `engine`."""
        chunks_s: list[float] = []
        tokens, seconds = timed(partial(self.ours.engine, self.batch, slots, chunks_s), self.ours.device)
        return tokens, seconds, chunks_s


def opposed(args: argparse.Namespace) -> Sides:
    """Makes one set of weights, and every side that decodes with it. `args`: of the command line."""
    size, device = TINY_SIZES[args.model] if args.tiny else SIZES[args.model], torch.device(args.device)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    lm = stored_in_float16(language_model(**size, dtype=dtype, device=device))
    given = [
        {name: (tensor.to(device), mask.to(device)) for name, (tensor, mask) in c.items()}
        for c in (conditions(size["kind"], dim=size["dim"], seed=i) for i in range(max(args.slots)))
    ]
    sampling = SamplingParams(temperature=0 if args.greedy else 1)
    work = Workload(lm, given, round(args.seconds * FRAME_RATE_HZ), sampling, device)
    batch = batch_for(
        lm, slots=max(args.slots), precision=args.precision, graphs=args.graphs, kernels=args.kernels
    )
    return Sides(
        ours=work,
        theirs=work.of(round(min(args.audiocraft_seconds or args.seconds, args.seconds) * FRAME_RATE_HZ)),
        batch=batch,
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
        tokens, our_s, chunks_s = sides.engine(row.slots)
        row.audiocraft_steps_per_s.append(theirs.columns / audiocraft_s)
        if transformers_s is not None:
            row.transformers_steps_per_s.append(theirs.columns / transformers_s)
        row.engine_steps_per_s.append(ours.columns / our_s)
        row.gb_per_s.append(ours.bytes_per_step(row.slots, precision) * ours.columns / our_s / GB)
        row.chunks_s.append(chunks_s)
        row.tokens = compared(tokens[0], expected, ours)
        print(row.latest, flush=True)


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
