"""Measures how well the engine agrees with audiocraft, and a faster precision with the reference."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.workload import Workload
from musicgen_svc.engine.batch import Batch, DecodeRequest
from musicgen_svc.engine.delays import interleave
from musicgen_svc.engine.factory import batch_for
from musicgen_svc.engine.projections import Precision
from musicgen_svc.engine.ragged import RaggedSlot
from musicgen_svc.engine.sampling_params import SamplingParams

LEAST_TOP1 = 0.9
"""Least top-1 agreement of two correct forwards. In fp16 they disagree on about one in fifty tokens of a
model with random weights; two unrelated forwards agree on one in two thousand."""

GREEDY = SamplingParams(temperature=0)


@dataclass(frozen=True)
class Agreement:
    """How often the likeliest tokens are equal, where the engine reads what audiocraft generated."""

    frames: int
    top1: float
    """Share of equal tokens, from 0 to 1."""
    first_divergence: int | None
    """The first frame with a different token; from there on the two, each reading its own tokens, would
    differ. None: there is no such frame."""


def likeliest(work: Workload, frames: int = 64) -> Tensor:
    """Returns the tokens [K, frames] that audiocraft decodes greedily for the first request.

    It runs under its autocast, so its tokens are the likeliest ones of what its users run.
    """
    return replace(work, frames=frames, sampling=replace(work.sampling, temperature=0)).audiocraft()


@torch.inference_mode()
def with_audiocraft(work: Workload, batch: Batch, slots: int, expected: Tensor) -> Agreement:
    """Compares the engine's likeliest tokens with audiocraft's, which read the same tokens.

    The engine runs the step that is measured: the request that is compared has the last slot, after others.
    Each of its tokens is replaced by audiocraft's.

    Args:
        work: whose first request is decoded.
        batch: of our engine.
        slots: how many requests are decoded at once.
        expected: [K, frames] of `likeliest`.
    """
    greedy, frames = replace(work.sampling, temperature=0), expected.shape[1]
    delays, special = batch.decoder.delays, batch.decoder.card
    theirs = interleave(expected, delays, special)  # [K, S]
    request = DecodeRequest(work.given[0], None, frames, greedy, torch.Generator())
    opened = [batch.open(request) for _ in range(slots)]
    slot = opened[-1]
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
        for each in opened:
            batch.close(each)
    different = (~same).nonzero()  # [N, 2]: codebook, column
    first = min((column - 1 - delays[k] for k, column in different.tolist()), default=None)
    return Agreement(frames, float(same[theirs != special].float().mean()), first)


@torch.inference_mode()
def with_reference(work: Workload, precision: Precision, frames: int = 64) -> dict[str, float]:
    """Compares the logits of a faster precision with the reference's, where both read the same tokens.

    The guided logits are compared, because tokens are drawn from them.

    Returns:
        dict: share of equal likeliest tokens; mean and greatest Kullback-Leibler divergence, in nats.
    """
    batches = [batch_for(work.lm, precision=p, batch_kind="ragged") for p in ("reference", precision)]
    exact, rough = (
        batch.open(DecodeRequest(work.given[0], None, frames, GREEDY, torch.Generator())) for batch in batches
    )
    assert isinstance(exact, RaggedSlot) and isinstance(rough, RaggedSlot)  # which keep their logits
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
