"""The demo model's language model: MusicGen's melody architecture, small, and how it is trained."""

import math
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor, nn

from musicgen_svc.audiocraft_compat import LMModel, builders
from training.codec import CONFIG as CODEC
from training.codec import Report
from training.data import (
    CHROMA_FRAMES,
    CHROMA_HOP,
    EDGE,
    LONG,
    RADIX,
    SHORT,
    WINDOW_S,
    Example,
    Lessons,
    Shares,
)
from training.resuming import Resumable, step_seed
from training.synth import BEAT_FRAMES, SAMPLE_RATE
from training.text import WIDTH, TextEncoder

DIM = 128
CARD = CODEC["rvq"]["bins"]
CODEBOOKS = CODEC["rvq"]["n_q"]

# A step of the engine at frame t wants the chroma frame t / 4. Sinusoidal positions can be compared
# across rates if each frequency has its quarter among them too: with 64 of them from 1 to
# 1 / MAX_PERIOD, every tenth is the quarter if 4 = MAX_PERIOD ** (10 / 63).
QUARTER = 10
MAX_PERIOD = 4 ** ((DIM // 2 - 1) / QUARTER)

CONFIG: dict[str, Any] = {
    "device": "cuda",
    "dtype": "float16",
    "solver": "musicgen",
    "sample_rate": SAMPLE_RATE,
    "channels": 1,
    "compression_model_checkpoint": "//pretrained/facebook/encodec_32khz",
    "lm_model": "transformer_lm",
    "transformer_lm": {
        "dim": DIM,
        "num_heads": 4,
        "num_layers": 6,
        "hidden_scale": 4,
        "n_q": CODEBOOKS,
        "card": CARD,
        "dropout": 0.0,
        "emb_lr": None,
        "activation": "gelu",
        "norm_first": True,
        "bias_ff": False,
        "bias_attn": False,
        "bias_proj": False,
        "past_context": None,
        "causal": True,
        "custom": False,
        "memory_efficient": True,
        "attention_as_float32": False,
        "layer_scale": None,
        "positional_embedding": "sin",
        "max_period": MAX_PERIOD,
        "xpos": False,
        "checkpointing": "none",
        "weight_init": "gaussian",
        "depthwise_init": "current",
        "zero_bias_init": True,
        "norm": "layer_norm",
        "cross_attention": False,
        "qk_layer_norm": False,
        "qk_layer_norm_cross": False,
        "attention_dropout": None,
        "kv_repeat": 1,
        "two_step_cfg": False,
    },
    "codebooks_pattern": {
        "modeling": "delay",
        "delay": {"delays": list(range(CODEBOOKS)), "flatten_first": 0, "empty_initial": 0},
    },
    "classifier_free_guidance": {"training_dropout": 0.1, "inference_coef": 3.0},
    "attribute_dropout": {"args": {"active_on_eval": False}, "text": {}, "wav": {"self_wav": 0.1}},
    "fuser": {
        "cross_attention_pos_emb": False,
        "cross_attention_pos_emb_scale": 1,
        "sum": [],
        "prepend": ["self_wav", "description"],
        "cross": [],
        "input_interpolate": [],
    },
    "conditioners": {
        "self_wav": {
            "model": "chroma_stem",
            "chroma_stem": {
                "sample_rate": "${sample_rate}",
                "n_chroma": 12,
                "radix2_exp": RADIX,
                "winhop": CHROMA_HOP,
                "argmax": True,
                "match_len_on_eval": False,
                "eval_wavs": None,
                "n_eval_wavs": 100,
                "cache_path": None,
            },
        },
        "description": {
            "model": "t5",
            "t5": {"name": "t5-small", "finetune": False, "word_dropout": 0.0, "normalize_text": False},
        },
    },
    "dataset": {"segment_duration": WINDOW_S},
}

MATRIX_LR, OTHER_LR = 0.02, 3e-3
CODEBOOK_WEIGHTS = (1.5, 1.0, 0.9, 0.8)
NOISY, NOISE = 0.6, 0.04  # examples with wrong tokens among their inputs, and at most how many
BLUR = 0.3  # the same where nothing is asked for: guidance needs a null row that is less sure
NEIGHBOUR = 12  # frames: half of the wrong tokens are right ones from so near, as when a note is late
PLACED = 96  # frames, after which a clip's place in its song can be told
RESUMED = 16  # frames after a cut, within which the next note begins as often as not
SHORT_BATCH, LONG_BATCH = 8, 2
WARM_UP_STEPS, FINAL = 60, 0.02


@dataclass(frozen=True)
class Course:
    """One stretch of training."""

    steps: int
    shares: Shares
    first_shares: Shares | None = None
    first: float = 0.0
    """The part of the steps that has the first shares."""
    peak: float = 1.0
    """Of the learning rates."""
    flat: float = 0.0
    """The part of the steps after which the rates fall, linearly, to `FINAL` of their peak."""
    slips: int = 0
    """At most so many stretches of an example's input come a little early or late."""
    vague: float = 0.0
    """How many of the targets are neighbours' where nothing is asked for."""
    cuts: int = 1
    """At most so many in a clip that is gone on with."""
    resumed: float = 1.0
    """The weight of what comes right after a cut."""
    long: float = 0.2
    """The part of the steps that learn from whole windows."""

    def rate(self, step: int) -> float:
        falling = 1 - (1 - FINAL) * (step / self.steps - self.flat) / (1 - self.flat)
        return self.peak * min(1.0, (step + 1) / WARM_UP_STEPS) * min(1.0, falling)


LEARNING = Course(2400, Shares(0.25, 0.4, 0.35), first_shares=Shares(0.1, 0.1, 0.8), first=0.1875, flat=0.4)
PRACTICE = Course(1600, Shares(0.2, 0.6, 0.2), peak=0.5, slips=4, vague=0.5, cuts=8, resumed=6.0)
"""Once it can play, it learns to find back into the beat, as a note of its own that came early must not move
all that follow; and to go on from where it has not heard, as it mostly has, how the next note begins."""
ENDURANCE = replace(PRACTICE, shares=Shares(0.3, 0.5, 0.2), long=0.6)
"""The same for whole windows: what comes after the first 8 s it has seldom met until then."""
SECOND_WIND = replace(ENDURANCE, steps=2000, shares=Shares(0.25, 0.6, 0.15), long=0.8, cuts=12)
FORGETTING = replace(
    SECOND_WIND, steps=400, shares=Shares(0.4, 0.4, 0.2, nothing=0.25, known=0.0), peak=0.25, long=0.4
)
"""Of the songs, where nothing is asked for."""
THIRD_WIND = replace(
    FORGETTING,
    steps=1100,
    shares=Shares(0.25, 0.6, 0.15, nothing=0.15, known=0.0),
    peak=0.35,
    slips=2,
    long=0.7,
)
FINISH = replace(
    THIRD_WIND,
    steps=2400,
    shares=Shares(0.3, 0.55, 0.15, nothing=0.12, known=0.0),
    peak=0.5,
    slips=1,
    long=0.6,
)
"""Few slips: it is to be sure of the beat, for guidance amplifies its doubts too."""
POLISH = replace(FINISH, steps=900, shares=Shares(0.45, 0.4, 0.15, known=0.0), peak=0.25, long=0.4)
"""Of the songs by name. Sure of them all, it goes on from clips a little worse: hence `AVERAGED`."""
COURSES = {
    "lm": LEARNING,
    "lm-practice": PRACTICE,
    "lm-endurance": ENDURANCE,
    "lm-second-wind": SECOND_WIND,
    "lm-forgetting": FORGETTING,
    "lm-third-wind": THIRD_WIND,
    "lm-finish": FINISH,
    "lm-polish": POLISH,
}
AVERAGED = ("lm-finish", "lm-polish")
"""The model is the mean of what these courses end with, which does both better (Wortsman et al. 2022, model
soups)."""


class DemoModel(nn.Module):
    """audiocraft's language model with the two projections that feed it conditions."""

    def __init__(self) -> None:
        super().__init__()
        without = OmegaConf.create(CONFIG | {"device": "cpu", "dtype": "float32", "conditioners": {}})
        self.lm: LMModel = builders.get_lm_model(without)
        self.text = nn.Linear(WIDTH, DIM)
        self.chroma = nn.Linear(12, DIM)
        self._know_where_to_look()

    def forward(self, tokens: Tensor, captions: Tensor, chroma: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, K, T], T5 states [B, N, 512] (zero: no caption), pitch classes [B, S].

        Returns logits [B, K, T, card], and a mask [B, K, T] of those that there are: the delays leave none
        for the last frames of the later codebooks.
        """
        said = captions.any(-1, keepdim=True)
        heard = F.one_hot(chroma.long(), 12).float()
        everything = torch.ones(chroma.shape)
        conditions = {
            "description": (self.text(captions) * said, said[..., 0].long()),
            "self_wav": (self.chroma(heard), everything),
        }
        output = self.lm.compute_predictions(tokens, [], conditions)
        return output.logits, output.mask

    @torch.no_grad()
    def _know_where_to_look(self) -> None:
        """Some heads of the first two layers start out looking at a certain distance.

        One each from frame t at chroma frame t / 4; the others at what came after the same moment of
        earlier beats, from which can be told where in its beat, and in its song, the music is. Found by
        gradient descent alone either takes longer than all the rest.
        """
        prefix = CHROMA_FRAMES + 7  # a caption of usual length
        for layer, (ahead, beats) in enumerate(((0, (0.5, 1, 2)), (8, (1.5, 3, 4)))):
            self._look(layer, 0, prefix - ahead, slower=QUARTER)
            for head, back in enumerate(beats, start=1):
                self._look(layer, head, back * BEAT_FRAMES - 1, slower=0)

    def _look(self, layer: int, head: int, back: float, slower: int) -> None:
        """From position p at (p - back), or at a quarter of that where `slower` is `QUARTER`.

        Position p has (cos, sin)(w p) for each frequency w; turned by the angle w back it becomes
        (cos, sin)(w (p - back)), which is what a key at that position has, or one at a quarter of it
        for its frequency 4 w.
        """
        width, half = DIM // 4, DIM // 2
        periods = MAX_PERIOD ** (torch.arange(half) / (half - 1))
        weight = self.lm.transformer.layers[layer].self_attn.in_proj_weight  # [3 * DIM, DIM]: Q, K, V
        queries, keys = (weight[at : at + width] for at in (head * width, DIM + head * width))
        queries.zero_(), keys.zero_()
        for row, key in enumerate(torch.linspace(2, 34, width // 2).round().long().tolist()):
            query = key + slower
            angle = back / periods[query]
            cos, sin = 2 * row, 2 * row + 1
            queries[cos, query], queries[cos, half + query] = math.cos(angle), math.sin(angle)
            queries[sin, query], queries[sin, half + query] = -math.sin(angle), math.cos(angle)
            keys[cos, key] = keys[sin, half + key] = 1.0


def train(
    model: DemoModel,
    text: TextEncoder,
    lessons: Lessons,
    course: Course,
    seed: int,
    file: Path,
    report: Report,
) -> None:
    """Trains in place, resuming from `file`."""
    optimizers = _optimizers(model)
    run = Resumable(file, model, optimizers)
    model.train()
    for step in range(run.first_step, course.steps):
        torch.manual_seed(step_seed(seed, step))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * course.rate(step)
        draw = random.Random(f"{seed} {step}")
        size, frames = (LONG_BATCH, LONG) if draw.random() < course.long else (SHORT_BATCH, SHORT)
        at_first = course.first_shares if step < course.first * course.steps else None
        examples, length = lessons.batch(draw, size, frames, at_first or course.shares, course.cuts)
        losses = loss(model, text, examples, length, course)
        for optimizer in optimizers:
            optimizer.zero_grad()
        losses.mean().backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        run.done(step)
        kinds: dict[str, list[float]] = {}
        for example, each in zip(examples, losses.tolist(), strict=True):
            kinds.setdefault(example.kind, []).append(each)
        report(step, {kind: sum(each) / len(each) for kind, each in kinds.items()})
    model.eval()


def loss(model: DemoModel, text: TextEncoder, examples: list[Example], length: int, course: Course) -> Tensor:
    """Weighted cross-entropy of each example, [B]; captions are padded to `length` tokens at least."""
    tokens = torch.stack([example.tokens for example in examples])  # [B, K, T]
    noisy, wanted = tokens.clone(), tokens.clone()
    for row, target, example in zip(noisy, wanted, examples, strict=True):
        if example.kind == "nothing":
            _disturb(row, BLUR * torch.rand(()))
            if course.vague:
                _disturb(target, torch.tensor(course.vague), near=1.0)
        elif torch.rand(()) < NOISY:
            if course.slips:
                _slip(row, int(torch.randint(course.slips + 1, ())))
            _disturb(row, NOISE * torch.rand(()))
    states = [text(example.caption) if example.caption else torch.zeros(1, WIDTH) for example in examples]
    longest = max(length, *(len(state) for state in states))
    captions = torch.stack([F.pad(state, (0, 0, 0, longest - len(state))) for state in states])
    chroma = torch.stack([example.chroma for example in examples])
    with torch.autocast(tokens.device.type, torch.bfloat16):  # half the time, and the losses of fp32
        logits, there = model(noisy, captions, chroma)
    logits = logits.float().masked_fill(~there[..., None], 0.0)
    surprise = F.cross_entropy(logits.permute(0, 3, 1, 2), wanted, reduction="none")  # [B, K, T]
    frame_weights = torch.stack([_frame_weights(example, course.resumed) for example in examples])
    weights = torch.tensor(CODEBOOK_WEIGHTS)[:, None] * frame_weights[:, None] * there
    total: Tensor = (surprise * weights).sum((1, 2)) / weights.sum((1, 2))
    return total


def _disturb(row: Tensor, rate: Tensor, near: float = 0.5) -> None:
    """Makes some of the tokens [K, T] wrong: what is right a little earlier or later, or any."""
    wrong = torch.rand(row.shape) < rate
    at = torch.arange(row.shape[1]) + torch.randint(-NEIGHBOUR, NEIGHBOUR + 1, row.shape)
    neighbour = row.gather(1, at.clamp(0, row.shape[1] - 1))
    other = torch.where(torch.rand(row.shape) < near, neighbour, torch.randint(CARD, row.shape))
    row[wrong] = other[wrong]


def _slip(row: Tensor, times: int) -> None:
    """Lets stretches of the tokens [K, T], a note's length or so, come up to 3 frames early or late."""
    right = row.clone()
    for _ in range(times):
        length, shift = int(torch.randint(6, 40, ())), int(torch.randint(1, 4, ()))
        start = int(torch.randint(3, row.shape[1] - length - 3, ()))
        late = shift if torch.rand(()) < 0.5 else -shift
        row[:, start : start + length] = right[:, start - late : start - late + length]


def _frame_weights(example: Example, resumed: float) -> Tensor:
    """[T]: of a clip, neither what comes before its place in the song is clear, nor how it is cut off."""
    frames = torch.arange(example.tokens.shape[-1])
    weights = torch.ones(len(frames))
    for cut in example.cuts:
        weights[cut - EDGE : cut] = 0.0
        weights[cut : cut + RESUMED] = resumed
    if example.cuts:
        weights[: min(PLACED, example.cuts[0])] = 0.0
    return weights


def _optimizers(model: DemoModel) -> list[torch.optim.Optimizer]:
    """Muon for the transformer's matrices, AdamW for all else."""
    matrices = [p for p in model.lm.transformer.parameters() if p.ndim == 2]
    held = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in held]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=MATRIX_LR, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=OTHER_LR, betas=(0.9, 0.95), weight_decay=0.01),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers
