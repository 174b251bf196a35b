"""T5's encoder: a prompt's tokens -> embeddings, as transformers' `T5EncoderModel` computes them.

Importing that one takes longer than importing torch: it brings a training stack. The encoder itself is
small and settled (Raffel et al. 2020, arXiv:1910.10683; gated feed-forward: Shazeer 2020,
arXiv:2002.05202). Modules carry the names of the released weights, some of which are odd. The tokenizer
is in `tokenizer.py`.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from musicgen_svc.checkpoints import TransformersPart
from musicgen_svc.checkpoints.agreement import agree_t5
from musicgen_svc.checkpoints.fitting import check_fit
from musicgen_svc.checkpoints.part_configs import t5_fields
from musicgen_svc.checkpoints.soundness import check_finite
from musicgen_svc.errors import WeightsError
from musicgen_svc.models.meta_init import on_meta
from musicgen_svc.runtime.ticks import Tick, no_tick

_SHARED = "shared.weight"
_EMBEDDING = "encoder.embed_tokens.weight"


def load_t5(source: TransformersPart, device: torch.device) -> "T5Encoder":
    """Builds the encoder in fp32, from its own folder or from inside a checkpoint.

    Raises:
        WeightsError: it is no T5, or a variant of it, its weights do not fit its configuration, or they
            are not finite.
    """
    config, state, origin = source.config, source.state, source.origin
    if config.get("model_type", "t5") != "t5":
        raise WeightsError(f"{origin} holds a {config['model_type']!r:.40}; the text encoder must be a 't5'.")
    # One tensor under one or both of two names. The decoder, where there is one, is not needed.
    own = {name: t for name, t in state.items() if name.startswith("encoder.") or name == _SHARED}
    embedding = own.pop(_EMBEDDING, None)
    if embedding is not None:
        own.setdefault(_SHARED, embedding)
    fields = t5_fields(config, origin)
    agree_t5(fields, own, origin)
    with on_meta():
        encoder = T5Encoder(**fields)
    check_fit(encoder.state_dict(), own, "T5 encoder", origin)
    placed = {name: tensor.to(device, torch.float32) for name, tensor in own.items()}
    check_finite(placed.items(), origin)
    encoder.load_state_dict(placed, assign=True)
    return encoder.eval().requires_grad_(False)


class T5Encoder(nn.Module):
    """Layers of attention in both directions; positions are told by a bias that the layers share."""

    def __init__(
        self, *, vocab_size: int, d_model: int, d_kv: int, d_ff: int, num_layers: int, num_heads: int,
        relative_attention_num_buckets: int, relative_attention_max_distance: int,
        layer_norm_epsilon: float, feed_forward_proj: str,
    ) -> None:  # fmt: skip
        super().__init__()
        self.vocab_size, self.d_model = vocab_size, d_model
        self.max_distance = relative_attention_max_distance
        self.shared = nn.Embedding(vocab_size, d_model)
        blocks = [
            _Block(
                _Attention(d_model, num_heads, d_kv, layer_norm_epsilon),
                _FeedForward(d_model, d_ff, feed_forward_proj, layer_norm_epsilon),
            )
            for _ in range(num_layers)
        ]
        self.bias = (nn.Embedding(relative_attention_num_buckets, num_heads),)
        blocks[0].attention["relative_attention_bias"] = self.bias[0]  # where the files have it
        norm = _RmsNorm(d_model, layer_norm_epsilon)
        self.encoder = nn.ModuleDict({"block": nn.ModuleList(blocks), "final_layer_norm": norm})

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, tick: Tick = no_tick
    ) -> torch.Tensor:
        """[B, S], [B, S] (1: a token, 0: padding) -> [B, S, D]; `tick` counts blocks."""
        assert input_ids.shape == attention_mask.shape
        hidden: torch.Tensor = self.shared(input_ids)
        # A number, not -inf, which would make a row without any token NaN.
        unseen = torch.finfo(hidden.dtype).min
        bias = torch.where(attention_mask[:, None, None].bool(), self._position_bias(input_ids), unseen)
        blocks: nn.ModuleList = self.encoder["block"]  # type: ignore[assignment]
        for index, block in enumerate(blocks):
            hidden = block(hidden, bias)
            tick(index + 1, len(blocks))
        encoded: torch.Tensor = self.encoder["final_layer_norm"](hidden)
        return encoded

    def _position_bias(self, input_ids: torch.Tensor) -> torch.Tensor:
        """What each head adds for the distance from query to key, [1, H, S, S]."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        distances = positions[None] - positions[:, None]  # [S, S]
        bias: torch.Tensor = self.bias[0](buckets(distances, self.bias[0].num_embeddings, self.max_distance))
        return bias.permute(2, 0, 1)[None]


def buckets(distances: torch.Tensor, count: int, max_distance: int) -> torch.Tensor:
    """Distances -> which of `count` buckets; any shape.

    Half of them are for keys before the query, half for those after it. Of each half the first half is
    for one distance each, the second for ranges that grow as a logarithm up to `max_distance`.
    """
    half = count // 2
    exact = half // 2
    far = distances.abs()
    log = torch.log(far.float() / exact) / math.log(max_distance / exact) * (half - exact)
    ranged = (exact + log.to(torch.long)).clamp(max=half - 1)
    return torch.where(far < exact, far, ranged) + half * (distances > 0)


class _Block(nn.Module):
    def __init__(self, attention: "_Attention", feed_forward: "_FeedForward") -> None:
        super().__init__()
        self.layer = nn.ModuleList([attention, feed_forward])

    @property
    def attention(self) -> nn.ModuleDict:
        attention = self.layer[0]
        assert isinstance(attention, _Attention)
        return attention.SelfAttention

    def forward(self, hidden: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """[B, S, D], [B, H, S, S] -> [B, S, D]"""
        hidden = hidden + self.layer[0](hidden, bias)
        added: torch.Tensor = self.layer[1](hidden)
        return hidden + added


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int, head_dim: int, epsilon: float) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.SelfAttention = nn.ModuleDict({name: nn.Linear(dim, inner, bias=False) for name in "qkv"})
        self.SelfAttention["o"] = nn.Linear(inner, dim, bias=False)
        self.layer_norm = _RmsNorm(dim, epsilon)

    def forward(self, hidden: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        hidden = self.layer_norm(hidden)
        own = self.SelfAttention
        query, key, value = (
            own[name](hidden).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, H, S, D/H]
            for name in "qkv"
        )
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0)
        attended: torch.Tensor = own["o"](mixed.transpose(1, 2).flatten(2))
        return attended


class _FeedForward(nn.Module):
    def __init__(self, dim: int, inner: int, kind: str, epsilon: float) -> None:
        super().__init__()
        self.gated = kind == "gated-gelu"
        names = ("wi_0", "wi_1") if self.gated else ("wi",)
        self.DenseReluDense = nn.ModuleDict({name: nn.Linear(dim, inner, bias=False) for name in names})
        self.DenseReluDense["wo"] = nn.Linear(inner, dim, bias=False)
        self.layer_norm = _RmsNorm(dim, epsilon)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = self.layer_norm(hidden)
        own = self.DenseReluDense
        if self.gated:
            inner = F.gelu(own["wi_0"](hidden), approximate="tanh") * own["wi_1"](hidden)
        else:
            inner = F.relu(own["wi"](hidden))
        forwarded: torch.Tensor = own["wo"](inner)
        return forwarded


class _RmsNorm(nn.Module):
    """Divides by the root mean square; no mean is taken off."""

    def __init__(self, dim: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.epsilon = epsilon

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.weight * (hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.epsilon))
