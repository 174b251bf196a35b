"""How well the engine agrees with audiocraft, and a faster precision with the reference."""

from dataclasses import dataclass, replace

import torch

from benchmarks.workload import Workload
from musicgen_svc.engine.batch import Batch, DecodeRequest
from musicgen_svc.engine.delays import interleave
from musicgen_svc.engine.factory import batch_for
from musicgen_svc.engine.projections import Precision
from musicgen_svc.engine.sampling_params import SamplingParams

LEAST_TOP1 = 0.9
"""Below that something is computed otherwise. In fp16 two right forwards disagree on about one in
fifty tokens of a model with random weights; two unrelated ones agree on one in two thousand."""

GREEDY = SamplingParams(temperature=0)


@dataclass(frozen=True)
class Agreement:
    """Between likeliest tokens, where the engine reads what audiocraft generated."""

    frames: int
    top1: float
    first_divergence: int | None
    """The frame at which the two, each reading its own tokens, part. None: they do not."""


@torch.inference_mode()
def with_audiocraft(work: Workload, batch: Batch, frames: int = 64) -> Agreement:
    """audiocraft decodes greedily, under its autocast: that is the top of its own logits. The engine, by
    the very step that is measured, is shown audiocraft's token after each of its own.
    """
    greedy = replace(work, frames=frames, sampling=replace(work.sampling, temperature=0))
    delays, special = batch.decoder.delays, batch.decoder.card
    theirs = interleave(greedy.audiocraft(), delays, special)  # [K, S]
    slot = batch.open(DecodeRequest(work.given[0], None, frames, greedy.sampling, torch.Generator()))
    same = torch.ones_like(theirs, dtype=torch.bool)
    try:
        while True:
            last = slot.filled - 1
            same[:, last] = slot.columns[:, last] == theirs[:, last]
            slot.columns[:, last] = theirs[:, last]
            if slot.done:
                break
            batch.step()
    finally:
        batch.close(slot)
    parted = (~same).nonzero()  # [N, 2]: codebook, column
    first = min((column - 1 - delays[k] for k, column in parted.tolist()), default=None)
    return Agreement(frames, float(same[theirs != special].float().mean()), first)


@torch.inference_mode()
def with_reference(work: Workload, precision: Precision, frames: int = 64) -> dict[str, float]:
    """How a faster precision's logits differ from the reference's where both read the same tokens.

    The guided logits are compared, as they are what tokens are drawn from.
    """
    batches = [batch_for(work.lm, precision=p, batch_kind="ragged") for p in ("reference", precision)]
    exact, rough = (
        batch.open(DecodeRequest(work.given[0], None, frames, GREEDY, torch.Generator())) for batch in batches
    )
    agreed, divergence = [], []
    while True:
        p, q = (slot.logits.float().log_softmax(-1) for slot in (exact, rough))
        agreed.append((p.argmax(-1) == q.argmax(-1)).float().mean())
        divergence.append((p.exp() * (p - q)).sum(-1).mean())
        if exact.done:
            break
        rough.columns.copy_(exact.columns)
        for batch in batches:
            batch.step()
    return {
        "top1_agreement": float(torch.stack(agreed).mean()),
        "mean_kl_nats": float(torch.stack(divergence).mean()),
        "max_kl_nats": float(torch.stack(divergence).max()),
    }
