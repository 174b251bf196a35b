"""Our own forward pass over the weights of audiocraft's `LMModel`.

The weights are shared with the model, or packed, see `projections.py`. The arithmetic is audiocraft's:
embeddings and positions in the embeddings' dtype, the residual stream and LayerNorms in fp32, products and
attention in the layers' dtype. On a CPU all of these are fp32. On a GPU audiocraft converts only the layers
to fp16, and autocast does the rest. Our pass reads less memory: cached keys and values are not copied, those
of the text are computed once per request, and rows that cannot change the result are not computed.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musicgen_svc.audiocraft_compat import LMModel
from musicgen_svc.engine.architecture import check_architecture
from musicgen_svc.engine.kv_cache import Attention
from musicgen_svc.engine.layers import Layer, Norm, bind_layer
from musicgen_svc.engine.projections import Precision, Projection, merged, projection
from musicgen_svc.runtime.ticks import Check, no_check

type Conditions = Mapping[str, tuple[Tensor, Tensor]]
"""audiocraft's `condition_tensors`: name -> ([2, S, D] embedding, [2, S] mask). Row 0 is the conditional one,
row 1 the null one."""

type WeightsLoader = Callable[[nn.Module], AbstractContextManager[object]]
"""Loads the weights of a submodule: inside the context manager they are loaded, after it they are dropped
unless something refers to them. What is needed afterwards must be packed or referenced inside."""


class Decoder:
    """Computes logits from tokens and the cache of what came before.

    Attributes:
        lm: audiocraft's model, whose weights are used.
        precision: how matrices are stored and multiplied.
        delays: [K] the delay of each codebook, in columns.
        codebooks, card: K, and the number of tokens in a codebook.
        dim, heads: D, and the number of attention heads.
        head_dim, inner_dim: the widths of an attention head and of the feed-forward block.
        activation: the feed-forward block's.
        layers: the transformer's layers.
        out_norm, output_heads: what follows the layers.
        weights: [card + 1, D] the embeddings of the first codebook; all embeddings have its device and dtype.
        rows_are_independent: whether no bit of a request's logits depends on the requests beside it.
        position_embeddings: [positions, D] in fp32; `reserve` replaces it by a longer table.
    """

    def __init__(
        self,
        lm: LMModel,
        precision: Precision = "reference",
        load_weights: WeightsLoader = nullcontext,
    ) -> None:
        """Binds the weights of a model.

        Args:
            lm: the model, in evaluation mode.
            precision: how matrices are stored and multiplied, see `projections.py`.
            load_weights: is called once for each layer and once for the output heads, from several threads.
                By default all weights are expected to be loaded.

        Raises:
            WeightsError: the model is built in a way that no released MusicGen is.
        """
        check_architecture(lm)
        self.lm = lm
        self.precision = precision
        self.delays: tuple[int, ...] = tuple(lm.pattern_provider.delays)
        self.codebooks: int = lm.n_q
        self.card: int = lm.card
        self.dim: int = lm.dim
        self.heads: int = lm.transformer.layers[0].self_attn.num_heads
        self.weights: Tensor = lm.emb[0].weight
        self.head_dim = self.dim // self.heads
        self.inner_dim: int = lm.transformer.layers[0].linear1.out_features
        self.activation: Callable[[Tensor], Tensor] = lm.transformer.layers[0].activation

        def make_norm(module: nn.LayerNorm) -> Norm:
            return Norm(module, self.dtype)

        products: list[Projection] = []

        def make_projection(weight: Tensor) -> Projection:
            product = projection(weight.detach(), precision)
            products.append(product)
            return product

        @torch.no_grad()  # must be set in each thread
        def make_layer(layer: nn.Module) -> Layer:
            with load_weights(layer):
                return bind_layer(layer, make_projection, make_norm)

        if self.device.type == "cpu":  # several layers at a time, since packing a matrix uses one core only
            with ThreadPoolExecutor(torch.get_num_threads()) as pool:
                self.layers = list(pool.map(make_layer, lm.transformer.layers))
        else:
            self.layers = [make_layer(layer) for layer in lm.transformer.layers]
        self.out_norm = make_norm(lm.out_norm)
        with load_weights(lm.linears):  # the heads of all codebooks are one product
            heads = merged([linear.weight for linear in lm.linears])
            self.output_heads = make_projection(heads.to(self.dtype))
        self.rows_are_independent = all(product.row_wise for product in products)
        self.position_embeddings = torch.empty(0)
        self.reserve(2048)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.weights.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the layers, in which products and attention are computed."""
        dtype: torch.dtype = self.lm.transformer.layers[0].linear1.weight.dtype
        return dtype

    @property
    def has_text(self) -> bool:
        """Whether the layers have cross-attention to a text."""
        return self.layers[0].cross_query is not None

    def reserve(self, positions: int) -> None:
        """Grows the table of position embeddings to this many positions, if it is shorter."""
        if positions > len(self.position_embeddings):
            transformer = self.lm.transformer
            table = position_table(
                positions, self.dim, transformer.max_period, self.weights.dtype, self.device
            )
            self.position_embeddings = transformer.positional_scale * table

    def fuse(self, conditions: Conditions) -> tuple[Tensor, Tensor | None]:
        """Applies audiocraft's fuser to the conditions.

        Returns:
            tuple: the prefix [rows, P, D], which comes before the tokens, and the text [rows, S, D] for
                cross-attention, or None.
        """
        rows = next((len(embedding) for embedding, _ in conditions.values()), 1)
        return self.lm.fuser(self.weights.new_zeros(rows, 0, self.dim), dict(conditions))  # type: ignore[no-any-return]

    def condition_lengths(self, conditions: Conditions) -> tuple[int, int]:
        """Returns upper bounds of the lengths (P, S) of the prefix and the text that `fuse` makes."""
        how = self.lm.fuser.fuse2cond
        prefix, text = (
            sum(conditions[name][0].shape[1] for name in how[way] if name in conditions)
            for way in ("prepend", "cross")
        )
        return prefix, max(text, 1)

    def text_keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Computes the keys and values of a text for the cross-attention of every layer.

        Args:
            text: [rows, S, D].

        Returns:
            tuple: keys and values, each [layers, rows, heads, S, head].
        """
        pairs = []
        for layer in self.layers:
            assert layer.cross_key_value is not None
            pairs.append(self._split_heads(F.linear(text.to(self.dtype), layer.cross_key_value), 2))
        return torch.stack([key for key, _ in pairs]), torch.stack([value for _, value in pairs])

    def logits(
        self,
        tokens: Tensor,
        request_of_row: Tensor,
        attention: Attention,
        prefix: Tensor | None = None,
        check: Check = no_check,
    ) -> Tensor:
        """Computes the logits that follow the last new token.

        Args:
            tokens: [requests, K, T] new columns.
            request_of_row: [rows] the index of the request whose tokens each row reads.
            attention: stores the new keys and values, and attends to them and the earlier ones.
            prefix: [rows, P, D] embeddings that come before the tokens. Only in a prefill.
            check: is called several times per layer, and may raise to end the request.

        Returns:
            Tensor: [rows, K, card] logits in the layers' dtype.
        """
        x = sum(F.embedding(tokens[:, k], self.lm.emb[k].weight) for k in range(self.codebooks))
        assert isinstance(x, Tensor)
        x = x[request_of_row].float()  # [rows, T, D]
        if prefix is not None:
            x = torch.cat([prefix.float(), x], dim=1)
        x = x + self.position_embeddings[attention.positions]
        delta: Tensor | None = None
        for index, layer in enumerate(self.layers):
            x, delta = self._forward_layer(x, delta, index, layer, attention, check)
        assert delta is not None
        _, hidden = self.out_norm(x[:, -1], delta[:, -1])
        return self.output_heads(hidden).view(len(hidden), self.codebooks, self.card)

    def _forward_layer(
        self, x: Tensor, delta: Tensor | None, index: int, layer: Layer, attention: Attention, check: Check
    ) -> tuple[Tensor, Tensor]:
        """Computes one layer.

        Args:
            x: [rows, T, D] the residual stream.
            delta: [rows, T, D] the previous block's result, which has not been added to the stream yet.

        Returns:
            tuple: the stream and the result of this layer's last block, in the same shapes.
        """
        x, normed = layer.norm(x, delta)
        query, key, value = self._split_heads(layer.qkv(normed), 3)
        check()
        delta = layer.out(_join_heads(attention.attend(index, query, key, value)))
        check()
        if layer.cross_norm is not None and (attention.text_rows is None or len(attention.text_rows)):
            x, normed = layer.cross_norm(x, delta)
            delta = self._cross_attend(normed, index, layer, attention)
            check()
        x, normed = layer.ff_norm(x, delta)
        inner = self.activation(layer.ff_in(normed))
        check()
        return x, layer.ff_out(inner)

    def _cross_attend(self, normed: Tensor, index: int, layer: Layer, attention: Attention) -> Tensor:
        """Computes cross-attention: [rows, T, D] -> the same shape, exactly zero for rows without a text."""
        assert layer.cross_query and layer.cross_out
        rows = attention.text_rows
        (query,) = self._split_heads(layer.cross_query(normed if rows is None else normed[rows]), 1)
        attended = layer.cross_out(_join_heads(attention.cross_attend(index, query)))
        return attended if rows is None else torch.zeros_like(normed).index_copy_(0, rows, attended)

    def _split_heads(self, packed: Tensor, parts: int) -> tuple[Tensor, ...]:
        """Splits packed projections: [rows, T, parts * D] -> for each part [rows, heads, T, head]."""
        rows, new, _ = packed.shape
        return packed.view(rows, new, parts, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


def position_table(
    positions: int, dim: int, max_period: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Computes sinusoidal position embeddings by the formula of audiocraft's `create_sin_embedding`.

    The exponents are rounded to the embeddings' dtype, as in audiocraft. The positions are not rounded,
    because fp16 and bf16 cannot represent all of them.

    Args:
        positions: how many positions the table has.
        dim: D, the width of an embedding: D / 2 cosines, then D / 2 sines.
        max_period: the longest period, in positions.
        dtype, device: those of the token embeddings.

    Returns:
        Tensor: [positions, dim] in fp32.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=dtype, device=device) / (half - 1)
    periods = torch.tensor(max_period, device=device) ** exponents.float()
    phase = torch.arange(positions, dtype=torch.float32, device=device)[:, None] / periods
    return torch.cat([phase.cos(), phase.sin()], dim=-1)


def _join_heads(x: Tensor) -> Tensor:
    """Joins the attention heads: [rows, heads, T, head] -> [rows, T, D]."""
    return x.transpose(1, 2).flatten(2)
