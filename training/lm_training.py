"""Trains the demo model's language model: one step, its loss, and the noise in its input."""

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.codec import Report
from training.data import EDGE_FRAMES, LONG_FRAMES, SHORT_FRAMES, Example, ExampleSampler
from training.lm import CARD, DemoModel
from training.lm_phases import Phase
from training.resuming import Resumable, step_seed
from training.text import WIDTH, TextEncoder

MATRIX_LR, OTHER_LR = 0.02, 3e-3
CODEBOOK_WEIGHTS = (1.5, 1.0, 0.9, 0.8)
NOISY_SHARE, MAX_NOISE = 0.6, 0.04  # examples with wrong tokens in their input, and the largest part of them
NULL_NOISE = 0.3  # the same without conditions: for guidance, the null row must be less certain
NEIGHBOUR_FRAMES = 12  # half of the wrong tokens are right ones from so near, as when a note is late
UNLOCATED_FRAMES = 96  # after which a clip's position in its song can be told
AFTER_CUT_FRAMES = 16  # after a cut, within which the next note begins in half of the cases
SHORT_BATCH, LONG_BATCH = 8, 2


def train(
    model: DemoModel,
    text: TextEncoder,
    sampler: ExampleSampler,
    phase: Phase,
    seed: int,
    file: Path,
    report: Report,
) -> None:
    """Trains a model in place.

    Args:
        model: what is trained.
        text: encodes the captions.
        sampler: draws the examples.
        phase: the settings.
        seed: of all draws.
        file: where the run is saved, and from where it is resumed if the file exists.
        report: called after each step with the mean loss of each mode.
    """
    optimizers = _optimizers(model)
    run = Resumable(file, model, optimizers)
    model.train()
    for step in range(run.first_step, phase.steps):
        torch.manual_seed(step_seed(seed, step))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * phase.rate(step)
        draw = random.Random(f"{seed} {step}")
        long = draw.random() < phase.long_share
        size, frames = (LONG_BATCH, LONG_FRAMES) if long else (SHORT_BATCH, SHORT_FRAMES)
        first_shares = phase.first_shares if step < phase.first_part * phase.steps else None
        examples, length = sampler.batch(draw, size, frames, first_shares or phase.shares, phase.max_cuts)
        losses = loss(model, text, examples, length, phase)
        for optimizer in optimizers:
            optimizer.zero_grad()
        losses.mean().backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        run.done(step)
        modes: dict[str, list[float]] = {}
        for example, each in zip(examples, losses.tolist(), strict=True):
            modes.setdefault(example.mode, []).append(each)
        report(step, {mode: sum(each) / len(each) for mode, each in modes.items()})
    model.eval()


def loss(model: DemoModel, text: TextEncoder, examples: list[Example], length: int, phase: Phase) -> Tensor:
    """Returns the weighted cross-entropy of each example, [B].

    Captions are padded to at least `length` tokens, which is the length that the sampler gave.
    """
    tokens = torch.stack([example.tokens for example in examples])  # [B, K, T]
    noisy, wanted = tokens.clone(), tokens.clone()
    for row, target, example in zip(noisy, wanted, examples, strict=True):
        if example.mode == "null":
            _replace_tokens(row, NULL_NOISE * torch.rand(()))
            if phase.null_target_noise:
                _replace_tokens(target, torch.tensor(phase.null_target_noise), near=1.0)
        elif torch.rand(()) < NOISY_SHARE:
            if phase.max_shifts:
                _shift_stretches(row, int(torch.randint(phase.max_shifts + 1, ())))
            _replace_tokens(row, MAX_NOISE * torch.rand(()))
    states = [text(example.caption) if example.caption else torch.zeros(1, WIDTH) for example in examples]
    longest = max(length, *(len(state) for state in states))
    captions = torch.stack([F.pad(state, (0, 0, 0, longest - len(state))) for state in states])
    chroma = torch.stack([example.chroma for example in examples])
    with torch.autocast(tokens.device.type, torch.bfloat16):  # half the time of fp32, with the same losses
        logits, mask = model(noisy, captions, chroma)
    logits = logits.float().masked_fill(~mask[..., None], 0.0)
    entropy = F.cross_entropy(logits.permute(0, 3, 1, 2), wanted, reduction="none")  # [B, K, T]
    frame_weights = torch.stack([_frame_weights(example, phase.after_cut_weight) for example in examples])
    weights = torch.tensor(CODEBOOK_WEIGHTS)[:, None] * frame_weights[:, None] * mask
    total: Tensor = (entropy * weights).sum((1, 2)) / weights.sum((1, 2))
    return total


def _replace_tokens(row: Tensor, rate: Tensor, near: float = 0.5) -> None:
    """Replaces some of the tokens [K, T] in place by wrong ones.

    Args:
        row: the tokens.
        rate: the part that is replaced.
        near: the part of the new tokens that come from a frame nearby; the others are random.
    """
    wrong = torch.rand(row.shape) < rate
    at = torch.arange(row.shape[1]) + torch.randint(-NEIGHBOUR_FRAMES, NEIGHBOUR_FRAMES + 1, row.shape)
    neighbour = row.gather(1, at.clamp(0, row.shape[1] - 1))
    other = torch.where(torch.rand(row.shape) < near, neighbour, torch.randint(CARD, row.shape))
    row[wrong] = other[wrong]


def _shift_stretches(row: Tensor, times: int) -> None:
    """Moves `times` stretches of the tokens [K, T] in place by up to 3 frames. A stretch is about a note."""
    right = row.clone()
    for _ in range(times):
        length, shift = int(torch.randint(6, 40, ())), int(torch.randint(1, 4, ()))
        start = int(torch.randint(3, row.shape[1] - length - 3, ()))
        late = shift if torch.rand(()) < 0.5 else -shift
        row[:, start : start + length] = right[:, start - late : start - late + length]


def _frame_weights(example: Example, after_cut_weight: float) -> Tensor:
    """Returns the weight of each frame in the loss, [T].

    The weight is 0 for frames from which nothing can be learned: those of a clip before its position in the
    song can be told, and those before a cut, which only tell that the clip ends.
    """
    frames = torch.arange(example.tokens.shape[-1])
    weights = torch.ones(len(frames))
    for cut in example.cuts:
        weights[cut - EDGE_FRAMES : cut] = 0.0
        weights[cut : cut + AFTER_CUT_FRAMES] = after_cut_weight
    if example.cuts:
        weights[: min(UNLOCATED_FRAMES, example.cuts[0])] = 0.0
    return weights


def _optimizers(model: DemoModel) -> list[torch.optim.Optimizer]:
    """Returns Muon for the transformer's matrices and AdamW for all other parameters."""
    matrices = [p for p in model.lm.transformer.parameters() if p.ndim == 2]
    matrix_ids = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in matrix_ids]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=MATRIX_LR, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=OTHER_LR, betas=(0.9, 0.95), weight_decay=0.01),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers
