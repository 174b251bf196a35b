"""audiocraft's language models with random weights, at any size: for tests and benchmarks.

Settings and shapes are the released models'; only the numbers are drawn.
"""

import math
from collections.abc import Mapping

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
SIZES = {
    "small": {"kind": "text", "dim": 1024, "layers": 24, "heads": 16},
    "medium": {"kind": "text", "dim": 1536, "layers": 48, "heads": 24},
    "large": {"kind": "text", "dim": 2048, "layers": 48, "heads": 32},
    "melody": {"kind": "melody", "dim": 1536, "layers": 48, "heads": 24},
}
MODELS = {"text": ("text", MONO), "melody": ("melody", MONO), "stereo": ("text", STEREO)}
"""What a step differs by: kind and delays."""
FUSED = {
    "text": {"sum": [], "prepend": [], "cross": ["description"], "input_interpolate": []},
    "melody": {"sum": [], "prepend": ["self_wav", "description"], "cross": [], "input_interpolate": []},
}

Conditions = Mapping[str, tuple[Tensor, Tensor]]


class Given(nn.Module):
    """A condition provider whose tensors were computed before."""

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
    """`kind`: "text" attends to its text, "melody" has melody and text stand before its tokens.

    `dtype` is that of the layers, as in audiocraft: embeddings, heads and the last norm stay fp32.
    """
    with on_meta():
        lm = LMModel(
            DelayedPatternProvider(len(delays), list(delays)),
            Given(),
            ConditionFuser(FUSED[kind]),
            n_q=len(delays), card=card, dim=dim, num_heads=heads, num_layers=layers, hidden_scale=4,
            norm="layer_norm", norm_first=True, bias_proj=False, bias_ff=False, bias_attn=False,
            activation="gelu", dropout=0.1, causal=True, memory_efficient=True,
            cross_attention=kind == "text", attribute_dropout={}, dtype=dtype, device="meta",
        )  # fmt: skip
    empty = {name: torch.empty(x.shape, dtype=x.dtype, device=device) for name, x in lm.state_dict().items()}
    lm.load_state_dict(empty, assign=True)
    lm = lm.eval().requires_grad_(False)
    draw = torch.Generator(device).manual_seed(seed)
    for name, parameter in lm.named_parameters():
        if "norm" in name:
            parameter.normal_(0, 0.1, generator=draw)
            parameter.add_(1 if name.endswith("weight") else 0)
        elif name.startswith("emb."):  # as loud as positions are: another token must be another input
            parameter.normal_(0, 0.7, generator=draw)
        else:  # heads twice as wide, so that logits differ as much as a trained model's
            gain = 2 if name.startswith("linears") else 0.7
            parameter.normal_(0, gain / math.sqrt(parameter.shape[1]), generator=draw)
    return lm


def conditions(
    kind: str = "text", *, dim: int = 64, seed: int = 0, tokens: int = 12, chroma: int = 235
) -> Conditions:
    """As T5 and the chroma conditioner give them: the null text is zeros, the null melody is not."""
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
    """[K, length] tokens by audiocraft's own loop, drawn from the global generator."""
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
