"""The demo model's language model: MusicGen's melody architecture, small, and how it is trained."""

import math
import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor, nn

from musicgen_svc.compat import LMModel, builders
from training.codec import CONFIG as CODEC
from training.codec import Report
from training.data import CHROMA_FRAMES, CHROMA_HOP, LONG, RADIX, SHORT, WINDOW_S, Example, Lessons
from training.resuming import Resumable, step_seed
from training.synth import SAMPLE_RATE
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
WARM_UP_STEPS, FLAT, FINAL = 60, 0.4, 0.02
CODEBOOK_WEIGHTS = (1.5, 1.0, 0.9, 0.8)
NOISY, NOISE = 0.6, 0.04  # examples with wrong tokens among their inputs, and at most how many
SHORT_BATCH, LONG_BATCH, LONG_SHARE = 8, 2, 0.2
MELODY_FIRST = 0.15  # of the steps are about melodies above all
MELODY_SHARES = {"text": 0.1, "continuation": 0.1, "melody": 0.8}
SHARES = {"text": 0.3, "continuation": 0.35, "melody": 0.35}


class DemoModel(nn.Module):
    """audiocraft's language model with the two projections that feed it conditions."""

    def __init__(self) -> None:
        super().__init__()
        without = OmegaConf.create(CONFIG | {"device": "cpu", "dtype": "float32", "conditioners": {}})
        self.lm: LMModel = builders.get_lm_model(without)
        self.text = nn.Linear(WIDTH, DIM)
        self.chroma = nn.Linear(12, DIM)
        self._listen_to_the_chroma()

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
    def _listen_to_the_chroma(self) -> None:
        """The first head of the first two layers starts out looking from frame t at chroma frame t / 4.

        Found by gradient descent alone this takes longer than all the rest. Position p has
        (cos, sin)(w p); turned by the prefix's length it becomes (cos, sin)(w (p - prefix)), and what
        matches it among the chroma's positions is the frequency 4 w at a quarter of the distance.
        """
        head, half = DIM // 4, DIM // 2
        periods = MAX_PERIOD ** (torch.arange(half) / (half - 1))
        keys = torch.linspace(2, 34, head // 2).round().long()
        prefix = CHROMA_FRAMES + 7  # a caption of usual length
        for layer, ahead in zip(self.lm.transformer.layers[:2], (0, 8), strict=True):
            weight = layer.self_attn.in_proj_weight  # [3 * DIM, DIM]: queries, keys, values
            weight[:head], weight[DIM : DIM + head] = 0, 0
            for row, key in enumerate(keys.tolist()):
                query = key + QUARTER
                angle = (prefix - ahead) / periods[query]
                cos, sin = 2 * row, 2 * row + 1
                weight[cos, query], weight[cos, half + query] = math.cos(angle), math.sin(angle)
                weight[sin, query], weight[sin, half + query] = -math.sin(angle), math.cos(angle)
                weight[DIM + cos, key] = weight[DIM + sin, half + key] = 1.0


def train(
    model: DemoModel,
    text: TextEncoder,
    lessons: Lessons,
    steps: int,
    seed: int,
    file: Path,
    report: Report,
) -> None:
    """Trains in place, resuming from `file`."""
    optimizers = _optimizers(model)
    run = Resumable(file, model, optimizers)
    model.train()
    for step in range(run.first_step, steps):
        torch.manual_seed(step_seed(seed, step))
        progress = step / steps
        falling = 1 - (1 - FINAL) * (progress - FLAT) / (1 - FLAT)
        rate = min(1.0, (step + 1) / WARM_UP_STEPS) * min(1.0, falling)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * rate
        draw = random.Random(f"{seed} {step}")
        size, frames = (LONG_BATCH, LONG) if draw.random() < LONG_SHARE else (SHORT_BATCH, SHORT)
        shares = MELODY_SHARES if progress < MELODY_FIRST else SHARES
        examples, length = lessons.batch(draw, size, frames, shares)
        losses = loss(model, text, examples, length)
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


def loss(model: DemoModel, text: TextEncoder, examples: list[Example], length: int) -> Tensor:
    """Weighted cross-entropy of each example, [B]; captions are padded to `length` tokens at least."""
    tokens = torch.stack([example.tokens for example in examples])  # [B, K, T]
    noisy = tokens.clone()
    for row in noisy:
        if torch.rand(()) < NOISY:
            wrong = torch.rand(row.shape) < NOISE * torch.rand(())
            row[wrong] = torch.randint(CARD, (int(wrong.sum()),))
    states = [text(example.caption) if example.caption else torch.zeros(1, WIDTH) for example in examples]
    longest = max(length, *(len(state) for state in states))
    captions = torch.stack([F.pad(state, (0, 0, 0, longest - len(state))) for state in states])
    chroma = torch.stack([example.chroma for example in examples])
    with torch.autocast(tokens.device.type, torch.bfloat16):  # half the time, and the losses of fp32
        logits, there = model(noisy, captions, chroma)
    logits = logits.float().masked_fill(~there[..., None], 0.0)
    surprise = F.cross_entropy(logits.permute(0, 3, 1, 2), tokens, reduction="none")  # [B, K, T]
    frames = torch.arange(tokens.shape[-1])
    learned = torch.stack([frames >= example.given for example in examples])[:, None] & there
    weights = torch.tensor(CODEBOOK_WEIGHTS)[:, None] * learned
    total: Tensor = (surprise * weights).sum((1, 2)) / weights.sum((1, 2))
    return total


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
