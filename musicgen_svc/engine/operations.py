"""The operations of a decoding step, except for most products, in plain PyTorch.

`kernels.py` has the same operations for GPUs. `factory.py` chooses one set of operations for each engine. The
plain operations define the correct results.
"""

from functools import cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from musicgen_svc.engine.sampling import SlotParameters, draw_counted, mix


class Attend(Protocol):
    """Attention of one query per row to the used positions of a cache, whose number each row has."""

    def __call__(
        self, query: Tensor, keys: Tensor, values: Tensor, new: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Computes the attention. The result is zero for a row without positions.

        Args:
            query: [rows, heads, 1, head].
            keys, values: [caches, heads, capacity, head]; `rows / caches` consecutive rows share one.
            new: key and value [rows, heads, 1, head] of each row's last position, which are stored first.
                Then each row must have at least one position and its own cache.

        Returns:
            Tensor: [rows, heads, 1, head].
        """


class Operations(Protocol):
    """The operations that an engine decodes with."""

    @property
    def reads_lengths(self) -> bool:
        """Whether the cost of attention depends on the lengths. If not, it depends on the extent."""

    def add_norm(
        self, x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Adds to the residual stream, and computes the LayerNorm of the sum.

        Args:
            x: [..., D] the residual stream in fp32.
            delta: [..., D] what is added. None adds nothing.
            weight, bias: [D] of the LayerNorm, in fp32.
            eps: is added to the variance.
            dtype: the dtype of the normalized sum.

        Returns:
            tuple: the sum [..., D] in fp32 and its LayerNorm [..., D], which is computed in fp32, in `dtype`.
        """

    def attention(self, lengths: Tensor, extent: int) -> Attend:
        """Prepares the attention for all layers of one step.

        Args:
            lengths: [rows] how many positions each row has used, on the device.
            extent: an upper bound of the lengths, which the host knows.
        """

    def draw(self, logits: Tensor, parameters: SlotParameters) -> Tensor:
        """Draws the next token of every codebook of every slot.

        Args:
            logits: [slots, 2, K, card], the conditional row first.
            parameters: how each slot's tokens are drawn.

        Returns:
            Tensor: [slots, K] tokens.
        """

    def int8_linear(self, x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
        """Computes x @ (weight * scales).T.

        Args:
            x: [..., in].
            weight: [out, in] in int8.
            scales: [out] in fp32, one for each output channel.

        Returns:
            Tensor: [..., out] in the dtype of x.
        """


class PlainOperations:
    """Operations in plain PyTorch, on any device."""

    reads_lengths = False

    def add_norm(
        self, x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Adds and normalizes in two or three launches."""
        if delta is not None:
            x = x + delta
        return x, F.layer_norm(x, weight.shape, weight, bias, eps).to(dtype)

    def attention(self, lengths: Tensor, extent: int) -> Attend:
        """Prepares attention with a mask over the extent, so its cost depends on the extent."""
        positions = torch.arange(extent, device=lengths.device)
        masked = positions >= lengths[:, None].clamp(min=1)  # a softmax over no position would be NaN
        empty = (lengths == 0)[:, None, None, None]
        rows, last = torch.arange(len(lengths), device=lengths.device), lengths - 1

        @cache
        def mask(dtype: torch.dtype) -> Tensor:
            """Returns the mask [rows, extent] that is added to the scores.

            A bool mask would be converted to this one in every layer by PyTorch's attention.
            """
            return torch.zeros(masked.shape, dtype=dtype, device=masked.device).masked_fill(
                masked, -torch.inf
            )

        def attend(
            query: Tensor, keys: Tensor, values: Tensor, new: tuple[Tensor, Tensor] | None = None
        ) -> Tensor:
            caches = len(keys)
            if new is not None:
                keys[rows, :, last], values[rows, :, last] = new[0][:, :, 0], new[1][:, :, 0]
            by_cache = query.view(caches, -1, *query.shape[1:])[:, :, :, 0]  # [caches, sharing, heads, head]
            attended = F.scaled_dot_product_attention(
                by_cache.transpose(1, 2),
                keys[:, :, :extent],
                values[:, :, :extent],
                attn_mask=mask(query.dtype).view(caches, 1, -1, extent),
            )
            attended = attended.transpose(1, 2).flatten(0, 1)[:, :, None]
            return attended if new is not None else attended.masked_fill(empty, 0)

        return attend

    def draw(self, logits: Tensor, parameters: SlotParameters) -> Tensor:
        """Applies guidance, and draws with `sampling.draw_counted`."""
        mixed = mix(logits[:, 0], logits[:, 1], parameters.guidance[:, None, None])
        return draw_counted(mixed, parameters)

    def int8_linear(self, x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
        """Converts the weight to the dtype of x first, which makes it slower than a product in that dtype."""
        return F.linear(x, (weight * scales[:, None]).to(x.dtype))


PLAIN: Operations = PlainOperations()
