"""audiocraft's language models with random weights, at any size: for tests and benchmarks.

Settings and shapes are those of the released models; only the values of the weights are random.
"""

import math
from collections.abc import Mapping
from typing import TypedDict

import torch
from torch import Tensor, nn

from musicgen_svc.audiocraft_compat import (
    ConditionFuser,
    ConditioningAttributes,
    DelayedPatternProvider,
    LMModel,
)
from musicgen_svc.engine.sampling_params import SamplingParams
from musicgen_svc.models.meta_init import on_meta
from musicgen_svc.runtime.randomness import GlobalRandom

MONO, STEREO = (0, 1, 2, 3), (0, 0, 1, 1, 2, 2, 3, 3)
"""Delays of the codebooks, in frames."""


class ModelSize(TypedDict):
    """Arguments of `language_model` that differ between the released models."""

    kind: str
    dim: int
    layers: int
    heads: int


SIZES: dict[str, ModelSize] = {
    "small": {"kind": "text", "dim": 1024, "layers": 24, "heads": 16},
    "medium": {"kind": "text", "dim": 1536, "layers": 48, "heads": 24},
    "large": {"kind": "text", "dim": 2048, "layers": 48, "heads": 32},
    "melody": {"kind": "melody", "dim": 1536, "layers": 48, "heads": 24},
}
TINY: ModelSize = {"kind": "text", "dim": 64, "layers": 2, "heads": 4}
TINY_SIZES: dict[str, ModelSize] = {name: {**TINY, "kind": size["kind"]} for name, size in SIZES.items()}
"""The released models with few and narrow layers, with which a command can be tried on any machine."""
MODELS = {"text": ("text", MONO), "melody": ("melody", MONO), "stereo": ("text", STEREO)}
"""Models whose decode steps differ: (kind, delays)."""
FUSED = {
    "text": {"sum": [], "prepend": [], "cross": ["description"], "input_interpolate": []},
    "melody": {"sum": [], "prepend": ["self_wav", "description"], "cross": [], "input_interpolate": []},
}
"""Where the fuser of each kind of model puts its conditions."""

Conditions = Mapping[str, tuple[Tensor, Tensor]]
"""Name of a condition -> its tensor [2, T, dim] and its mask [2, T]; the second row is the null condition."""


class FixedConditions(nn.Module):
    """A condition provider that returns tensors which were computed before."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: Conditions = {}

    def tokenize(self, attributes: object) -> Conditions:
        return self.tensors

    def forward(self, tokenized: Conditions) -> Conditions:
        return tokenized


def language_model(
    kind: str = "text",
    *,
    delays: tuple[int, ...] = MONO,
    dim: int = 64,
    layers: int = 3,
    heads: int = 4,
    card: int = 2048,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 1,
) -> LMModel:
    """Makes a language model with random weights.

    Args:
        kind: "text" attends to its text by cross-attention; "melody" has melody and text as a prefix of its
            tokens.
        delays: of the codebooks, in frames.
        dim: width of the layers.
        layers: number of layers.
        heads: attention heads of each layer.
        card: tokens of each codebook.
        dtype: of the layers. As in audiocraft, embeddings, heads and the last norm stay fp32.
        device: where the weights are. On PyTorch's meta device they have no values.
        seed: of the random values.
    """
    with on_meta():
        lm = LMModel(
            DelayedPatternProvider(len(delays), list(delays)),
            FixedConditions(),
            ConditionFuser(FUSED[kind]),
            n_q=len(delays), card=card, dim=dim, num_heads=heads, num_layers=layers, hidden_scale=4,
            norm="layer_norm", norm_first=True, bias_proj=False, bias_ff=False, bias_attn=False,
            activation="gelu", dropout=0.1, causal=True, memory_efficient=True,
            cross_attention=kind == "text", attribute_dropout={}, dtype=dtype, device="meta",
        )  # fmt: skip
    empty = {name: torch.empty(x.shape, dtype=x.dtype, device=device) for name, x in lm.state_dict().items()}
    lm.load_state_dict(empty, assign=True)
    lm = lm.eval().requires_grad_(False)
    if torch.device(device).type == "meta":
        return lm
    draw = torch.Generator(device).manual_seed(seed)
    for name, parameter in lm.named_parameters():
        if "norm" in name:
            parameter.normal_(0, 0.1, generator=draw)
            parameter.add_(1 if name.endswith("weight") else 0)
        elif name.startswith("emb."):  # as large as the positions, so that another token is another input
            parameter.normal_(0, 0.7, generator=draw)
        else:  # heads twice as wide, so that logits differ as much as a trained model's
            gain = 2 if name.startswith("linears") else 0.7
            parameter.normal_(0, gain / math.sqrt(parameter.shape[1]), generator=draw)
    return lm


def conditions(
    kind: str = "text", *, dim: int = 64, seed: int = 0, tokens: int = 12, chroma: int = 235
) -> Conditions:
    """Makes random conditions as T5 and the chroma conditioner give them.

    The null text is zeros, the null melody is not.

    Args:
        kind: of the model, as in `language_model`.
        dim: width of the model.
        seed: of the random values.
        tokens: length of the text.
        chroma: length of the melody, in chroma frames.
    """
    draw = torch.Generator().manual_seed(seed)
    text = torch.randn(2, tokens, dim, generator=draw)
    text[1] = 0
    given = {"description": (text, text[..., 0] != 0)}
    if kind == "melody":
        melody = torch.randn(2, chroma, dim, generator=draw)
        given = {"self_wav": (melody, torch.ones(2, chroma, dtype=torch.bool)), **given}
    return given


def audiocraft_generates(
    lm: LMModel,
    given: Conditions,
    *,
    prompt: Tensor | None,
    length: int,
    sampling: SamplingParams,
    seed: int,
) -> Tensor:
    """Generates tokens with audiocraft's own loop, which draws from torch's global generator.

    Args:
        lm: made by `language_model`.
        given: the conditions, or none.
        prompt: [K, T0] tokens to continue.
        length: frames to return, the prompt's among them.
        sampling: how tokens are drawn.
        seed: of the global generator, which is restored afterwards.

    Returns:
        Tensor: [K, length] tokens.
    """
    lm.condition_provider.tensors = given
    with GlobalRandom(seed, lm.emb[0].weight.device).pinned():
        codes: Tensor = lm.generate(
            prompt=None if prompt is None else prompt[None],
            conditions=[ConditioningAttributes()] if given else [],
            num_samples=1,
            max_gen_len=length,
            use_sampling=sampling.temperature > 0,
            temp=sampling.temperature,
            top_k=min(sampling.top_k, lm.card),
            top_p=sampling.top_p,
            cfg_coef=sampling.guidance,
        )
    return codes[0]
