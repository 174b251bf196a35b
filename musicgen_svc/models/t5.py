"""T5's encoder: computes embeddings of a prompt's tokens, as transformers' `T5EncoderModel` does.

transformers' class is not used, because its import takes longer than that of torch. The encoder is small and
its definition will not change (Raffel et al. 2020, arXiv:1910.10683; gated feed-forward: Shazeer 2020,
arXiv:2002.05202). Modules have the names of the released weights. The tokenizer is in `t5_tokenizer.py`.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from musicgen_svc.checkpoints import TransformersPart
from musicgen_svc.checkpoints.part_configs import t5_fields
from musicgen_svc.checkpoints.tensor_checks import check_finite, check_fit, check_t5_sizes
from musicgen_svc.errors import WeightsError
from musicgen_svc.models.meta_init import on_meta
from musicgen_svc.runtime.ticks import Tick, no_tick

_SHARED = "shared.weight"
_EMBEDDING = "encoder.embed_tokens.weight"


def load_t5(source: TransformersPart, device: torch.device) -> "T5Encoder":
    """Builds the encoder in fp32, from its own folder or from inside a checkpoint.

    Raises:
        WeightsError: it is no T5, it is an unsupported variant, its weights do not fit its configuration,
            or they are not finite.
    """
    config, state, origin = source.config, source.state, source.origin
    if config.get("model_type", "t5") != "t5":
        raise WeightsError(f"{origin} holds a {config['model_type']!r:.40}; the text encoder must be a 't5'.")
    # The embedding has one or both of two names. A decoder, if there is one, is not needed.
    own = {name: t for name, t in state.items() if name.startswith("encoder.") or name == _SHARED}
    embedding = own.pop(_EMBEDDING, None)
    if embedding is not None:
        own.setdefault(_SHARED, embedding)
    fields = t5_fields(config, origin)
    check_t5_sizes(fields, own, origin)
    with on_meta():
        encoder = T5Encoder(**fields)
    check_fit(encoder.state_dict(), own, "T5 encoder", origin)
    placed = {name: tensor.to(device, torch.float32) for name, tensor in own.items()}
    check_finite(placed.items(), origin)
    encoder.load_state_dict(placed, assign=True)
    return encoder.eval().requires_grad_(False)


class T5Encoder(nn.Module):
    """Transformer layers with attention in both directions, which share one relative position bias."""

    def __init__(
        self, *, vocab_size: int, d_model: int, d_kv: int, d_ff: int, num_layers: int, num_heads: int,
        relative_attention_num_buckets: int, relative_attention_max_distance: int,
        layer_norm_epsilon: float, feed_forward_proj: str,
    ) -> None:  # fmt: skip
        """Makes the modules. The arguments are fields of transformers' configuration, checked already."""
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
        blocks[0].attention["relative_attention_bias"] = self.bias[0]  # its place in the files
        norm = _RmsNorm(d_model, layer_norm_epsilon)
        self.encoder = nn.ModuleDict({"block": nn.ModuleList(blocks), "final_layer_norm": norm})

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, tick: Tick = no_tick
    ) -> torch.Tensor:
        """Computes the embeddings of tokens.

        Args:
            input_ids: [B, S].
            attention_mask: [B, S]; 1: a token, 0: padding.
            tick: called with the number of finished blocks.

        Returns:
            [B, S, D].
        """
        assert input_ids.shape == attention_mask.shape
        hidden: torch.Tensor = self.shared(input_ids)
        # The lowest number and not -inf, which would make a row without tokens NaN.
        masked = torch.finfo(hidden.dtype).min
        bias = torch.where(attention_mask[:, None, None].bool(), self._position_bias(input_ids), masked)
        blocks: nn.ModuleList = self.encoder["block"]  # type: ignore[assignment]
        for index, block in enumerate(blocks):
            hidden = block(hidden, bias)
            tick(index + 1, len(blocks))
        encoded: torch.Tensor = self.encoder["final_layer_norm"](hidden)
        return encoded

    def _position_bias(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Returns the bias of each head for the distance from query to key: [1, H, S, S]."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        distances = positions[None] - positions[:, None]  # [S, S]
        bias: torch.Tensor = self.bias[0](buckets(distances, self.bias[0].num_embeddings, self.max_distance))
        return bias.permute(2, 0, 1)[None]


def buckets(distances: torch.Tensor, count: int, max_distance: int) -> torch.Tensor:
    """Maps distances from query to key to buckets, as Raffel et al. 2020 define them.

    Half of the buckets are for keys before the query, half for keys after it. Of each half, the first half
    has one bucket per distance; in the second half the logarithms of the distances are divided evenly.

    Args:
        distances: of any shape, int64.
        count: how many buckets there are.
        max_distance: the distance from which all are in the last bucket.

    Returns:
        Bucket numbers of the same shape, from 0.
    """
    half = count // 2
    exact = half // 2
    far = distances.abs()
    log = torch.log(far.float() / exact) / math.log(max_distance / exact) * (half - exact)
    ranged = (exact + log.to(torch.long)).clamp(max=half - 1)
    return torch.where(far < exact, far, ranged) + half * (distances > 0)


class _Block(nn.Module):
    """One layer of the encoder: attention and feed-forward, each with a residual connection."""

    def __init__(self, attention: "_Attention", feed_forward: "_FeedForward") -> None:
        super().__init__()
        self.layer = nn.ModuleList([attention, feed_forward])

    @property
    def attention(self) -> nn.ModuleDict:
        """The projections of the attention, by their names in the files."""
        attention = self.layer[0]
        assert isinstance(attention, _Attention)
        return attention.SelfAttention

    def forward(self, hidden: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Applies the layer: hidden [B, S, D] and bias [B, H, S, S] -> [B, S, D]."""
        hidden = hidden + self.layer[0](hidden, bias)
        added: torch.Tensor = self.layer[1](hidden)
        return hidden + added


class _Attention(nn.Module):
    """Multi-head attention without scaling of the products, after a norm."""

    def __init__(self, dim: int, heads: int, head_dim: int, epsilon: float) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.SelfAttention = nn.ModuleDict({name: nn.Linear(dim, inner, bias=False) for name in "qkv"})
        self.SelfAttention["o"] = nn.Linear(inner, dim, bias=False)
        self.layer_norm = _RmsNorm(dim, epsilon)

    def forward(self, hidden: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Applies the attention: hidden [B, S, D] and bias [B, H, S, S] -> [B, S, D]."""
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
    """The feed-forward part, after a norm: ReLU, or GELU with a gate if `activation` is `gated-gelu`."""

    def __init__(self, dim: int, inner: int, activation: str, epsilon: float) -> None:
        super().__init__()
        self.gated = activation == "gated-gelu"
        names = ("wi_0", "wi_1") if self.gated else ("wi",)
        self.DenseReluDense = nn.ModuleDict({name: nn.Linear(dim, inner, bias=False) for name in names})
        self.DenseReluDense["wo"] = nn.Linear(inner, dim, bias=False)
        self.layer_norm = _RmsNorm(dim, epsilon)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Applies the part: [B, S, D] -> [B, S, D]."""
        hidden = self.layer_norm(hidden)
        own = self.DenseReluDense
        if self.gated:
            inner = F.gelu(own["wi_0"](hidden), approximate="tanh") * own["wi_1"](hidden)
        else:
            inner = F.relu(own["wi"](hidden))
        forwarded: torch.Tensor = own["wo"](inner)
        return forwarded


class _RmsNorm(nn.Module):
    """Divides by the root mean square over the last dimension, and scales; the mean is not subtracted."""

    def __init__(self, dim: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.epsilon = epsilon

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalizes: [B, S, D] -> [B, S, D]."""
        return self.weight * (hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.epsilon))
