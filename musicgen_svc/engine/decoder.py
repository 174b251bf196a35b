"""A forward of our own over the weights of audiocraft's `LMModel`.

The weights are shared with the model, or packed, see `projections.py`. The arithmetic is audiocraft's:
embeddings and positions in the embeddings' dtype, a residual stream and LayerNorms in fp32, products and
attention in the layers' dtype. On a CPU all of these are fp32; on a GPU audiocraft makes the layers alone
fp16, and autocast does the rest. What differs is what is read: keys and values stay where they are, the
text's are computed once per request, and rows that cannot change the result are left out.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musicgen_svc.audiocraft_compat import LMModel
from musicgen_svc.engine.architecture import check_architecture
from musicgen_svc.engine.kv_cache import Attention
from musicgen_svc.engine.operations import PLAIN, Operations
from musicgen_svc.engine.projections import Precision, Projection, projection
from musicgen_svc.runtime.ticks import Check, no_check

Conditions: TypeAlias = Mapping[str, tuple[Tensor, Tensor]]
"""audiocraft's `condition_tensors`: name -> ([2, S, D] embedding, [2, S] mask); conditional row, null row."""

Lend: TypeAlias = Callable[[nn.Module], AbstractContextManager[object]]
"""A context manager: inside it the submodule's weights are loaded.

Pack what is needed after, or keep a reference.
"""

AddNorm: TypeAlias = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""The residual stream in fp32, and what the block before adds to it -> their sum; and its norm, in the
layers' dtype. A block's result is added where the next norm reads the sum anyway."""


@dataclass(frozen=True)
class Layer:
    """One transformer layer: every weight bound to the operation that reads it."""

    norm: AddNorm
    qkv: Projection
    out: Projection
    cross_norm: AddNorm | None
    cross_query: Projection | None
    cross_key_value: Tensor | None  # [2 * D, D], read once per request
    cross_out: Projection | None
    ff_norm: AddNorm
    ff_in: Projection
    ff_out: Projection


class Decoder:
    """Tokens and what came before -> logits.

    lend: called for each layer and for the heads, once, from several threads; by default they are as they are

    Raises:
        WeightsError: the model is built in a way that no released MusicGen is.
    """

    def __init__(
        self,
        lm: LMModel,
        precision: Precision = "reference",
        operations: Operations = PLAIN,
        lend: Lend = nullcontext,
    ) -> None:
        check_architecture(lm)
        self._lm = lm
        self.precision = precision
        self.delays: tuple[int, ...] = tuple(lm.pattern_provider.delays)
        self.codebooks: int = lm.n_q
        self.card: int = lm.card
        self.dim: int = lm.dim
        self.heads: int = lm.transformer.layers[0].self_attn.num_heads
        self.weights: Tensor = lm.emb[0].weight
        self._activation: Callable[[Tensor], Tensor] = lm.transformer.layers[0].activation
        self.operations = operations

        def norm(module: nn.LayerNorm) -> AddNorm:
            return _add_norm(module, operations, self.dtype)

        def bound(weight: Tensor) -> Projection:
            return projection(weight.detach(), precision, operations)

        @torch.no_grad()  # which belongs to a thread
        def bind(layer: nn.Module) -> Layer:
            with lend(layer):
                return _layer(layer, bound, norm)

        if self.device.type == "cpu":  # side by side, as packing one matrix keeps one core busy
            with ThreadPoolExecutor(torch.get_num_threads()) as pool:
                self.layers = list(pool.map(bind, lm.transformer.layers))
        else:
            self.layers = [bind(layer) for layer in lm.transformer.layers]
        self._out_norm = norm(lm.out_norm)
        with lend(lm.linears):
            self._logits = bound(_merged_heads(lm).to(self.dtype))
        self._table = torch.empty(0)
        self.reserve(2048)

    @property
    def device(self) -> torch.device:
        return self.weights.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the layers, and of all that is multiplied."""
        dtype: torch.dtype = self._lm.transformer.layers[0].linear1.weight.dtype
        return dtype

    @property
    def has_text(self) -> bool:
        """Whether its layers attend to a text."""
        return self.layers[0].cross_query is not None

    def reserve(self, positions: int) -> None:
        """Makes the table of position embeddings at least this long."""
        if positions > len(self._table):
            transformer = self._lm.transformer
            table = position_table(
                positions, self.dim, transformer.max_period, self.weights.dtype, self.device
            )
            self._table = transformer.positional_scale * table

    def fuse(self, conditions: Conditions) -> tuple[Tensor, Tensor | None]:
        """Conditions -> prefix [rows, P, D] and the text to attend to [rows, S, D], by audiocraft's fuser."""
        rows = next((len(embedding) for embedding, _ in conditions.values()), 1)
        return self._lm.fuser(self.weights.new_zeros(rows, 0, self.dim), dict(conditions))  # type: ignore[no-any-return]

    def extent(self, conditions: Conditions) -> tuple[int, int]:
        """How long the prefix and the text are that `fuse` will make: the longest that they may be."""
        how = self._lm.fuser.fuse2cond
        prefix, text = (
            sum(conditions[name][0].shape[1] for name in how[way] if name in conditions)
            for way in ("prepend", "cross")
        )
        return prefix, max(text, 1)

    def text_keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """[rows, S, D] -> keys and values of every layer, each [layers, rows, heads, S, head]."""
        pairs = []
        for layer in self.layers:
            assert layer.cross_key_value is not None
            pairs.append(self._split(F.linear(text.to(self.dtype), layer.cross_key_value), 2))
        return torch.stack([key for key, _ in pairs]), torch.stack([value for _, value in pairs])

    def logits(
        self,
        tokens: Tensor,
        request_of_row: Tensor,
        attention: Attention,
        prefix: Tensor | None = None,
        check: Check = no_check,
    ) -> Tensor:
        """The logits that follow the last of the new tokens.

        tokens: [requests, K, T] new columns; request_of_row: [rows], as a request's rows read the same tokens
        prefix: [rows, P, D], stands before the tokens; only in a prefill
        Returns [rows, K, card] in the layers' dtype.
        """
        x = sum(F.embedding(tokens[:, k], self._lm.emb[k].weight) for k in range(self.codebooks))
        assert isinstance(x, Tensor)
        x = x[request_of_row].float()  # [rows, T, D]
        if prefix is not None:
            x = torch.cat([prefix.float(), x], dim=1)
        x = x + self._table[attention.positions]
        delta: Tensor | None = None
        for index, layer in enumerate(self.layers):
            x, delta = self._forward(x, delta, index, layer, attention, check)
        assert delta is not None
        _, hidden = self._out_norm(x[:, -1], delta[:, -1])
        return self._logits(hidden).view(len(hidden), self.codebooks, self.card)

    def _forward(
        self, x: Tensor, delta: Tensor | None, index: int, layer: Layer, attention: Attention, check: Check
    ) -> tuple[Tensor, Tensor]:
        """[rows, T, D] twice, the stream and what is still to be added to it -> the same."""
        x, normed = layer.norm(x, delta)
        query, key, value = self._split(layer.qkv(normed), 3)
        check()
        delta = layer.out(_joined(attention.attend(index, query, key, value)))
        check()
        if layer.cross_norm is not None and (attention.cross_rows is None or len(attention.cross_rows)):
            x, normed = layer.cross_norm(x, delta)
            delta = self._cross(normed, index, layer, attention)
            check()
        x, normed = layer.ff_norm(x, delta)
        inner = self._activation(layer.ff_in(normed))
        check()
        return x, layer.ff_out(inner)

    def _cross(self, normed: Tensor, index: int, layer: Layer, attention: Attention) -> Tensor:
        """[rows, T, D] -> what the text says to the rows that have one, exactly zero to the rest."""
        assert layer.cross_query and layer.cross_out
        rows = attention.cross_rows
        (query,) = self._split(layer.cross_query(normed if rows is None else normed[rows]), 1)
        heard = layer.cross_out(_joined(attention.cross(index, query)))
        return heard if rows is None else torch.zeros_like(normed).index_copy_(0, rows, heard)

    def _split(self, packed: Tensor, parts: int) -> tuple[Tensor, ...]:
        """[rows, T, parts * D] -> parts times [rows, heads, T, head]."""
        rows, new, _ = packed.shape
        return packed.view(rows, new, parts, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


def position_table(
    positions: int, dim: int, max_period: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """[positions, dim] cosines and sines in fp32, as `create_sin_embedding` has them.

    The exponents are rounded to the embeddings' dtype, as there; the positions are not, since fp16 and
    bf16 do not hold all of them.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=dtype, device=device) / (half - 1)
    periods = torch.tensor(max_period, device=device) ** exponents.float()
    phase = torch.arange(positions, dtype=torch.float32, device=device)[:, None] / periods
    return torch.cat([phase.cos(), phase.sin()], dim=-1)


def _layer(
    layer: Any, bound: Callable[[Tensor], Projection], norm: Callable[[nn.LayerNorm], AddNorm]
) -> Layer:
    cross = layer.cross_attention
    dim = layer.linear1.in_features
    return Layer(
        norm=norm(layer.norm1),
        qkv=bound(layer.self_attn.in_proj_weight),
        out=bound(layer.self_attn.out_proj.weight),
        cross_norm=None if cross is None else norm(layer.norm_cross),
        cross_query=None if cross is None else bound(cross.in_proj_weight[:dim]),
        cross_key_value=None if cross is None else cross.in_proj_weight[dim:],
        cross_out=None if cross is None else bound(cross.out_proj.weight),
        ff_norm=norm(layer.norm2),
        ff_in=bound(layer.linear1.weight),
        ff_out=bound(layer.linear2.weight),
    )


def _add_norm(module: nn.LayerNorm, operations: Operations, dtype: torch.dtype) -> AddNorm:
    """LayerNorm in fp32; of its weights only fp16 ones are copied."""
    weight, bias = module.weight.detach().float(), module.bias.detach().float()
    return lambda x, delta: operations.add_norm(x, delta, weight, bias, module.eps, dtype)


def _merged_heads(lm: LMModel) -> Tensor:
    """[K * card, D]: one product for all codebooks. The model's own heads become, or are, views of it."""
    weights: list[Tensor] = [linear.weight.data for linear in lm.linears]
    first = weights[0]
    in_a_row = [first.data_ptr() + k * first.nbytes for k in range(len(weights))]
    one_storage = len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
    if one_storage and [weight.data_ptr() for weight in weights] == in_a_row:
        return first.as_strided((len(weights) * lm.card, lm.dim), (lm.dim, 1))
    merged = torch.cat(weights)
    for linear, part in zip(lm.linears, torch.split(merged, lm.card), strict=True):
        linear.weight.data = part
    return merged


def _joined(x: Tensor) -> Tensor:
    """[rows, heads, T, head] -> [rows, T, D]."""
    return x.transpose(1, 2).flatten(2)
