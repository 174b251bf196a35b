"""What a decoding step does besides its products, in plain PyTorch. `kernels.py` has the same for GPUs.

An engine takes one set of operations or the other when it is made. The plain ones define what is right.
"""

from functools import cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from musicgen_svc.engine.sampling import SlotParameters, draw_counted, mix


class Attend(Protocol):
    """Attention of one query per row to the first positions of a cache, as many as the row has."""

    def __call__(
        self, query: Tensor, keys: Tensor, values: Tensor, new: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Attends. A row that has no positions gets zeros.

        Args:
            query: [rows, heads, 1, head].
            keys, values: [caches, heads, capacity, head]; `rows / caches` neighbouring rows share one.
            new: key and value [rows, heads, 1, head] of each row's last position, which are stored first.
                Every row then has one, and a cache of its own.

        Returns:
            Tensor: [rows, heads, 1, head].
        """


class Operations(Protocol):
    """The operations that an engine decodes with."""

    @property
    def reads_lengths(self) -> bool:
        """Whether attention costs what the lengths on the device say. Otherwise it costs the extent."""

    def add_norm(
        self, x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Adds to the residual stream, and normalizes the sum.

        Args:
            x: [..., D] the residual stream in fp32.
            delta: [..., D] what is added, or None.
            weight, bias, eps: of the LayerNorm, which is computed in fp32.
            dtype: that of the normalized sum.

        Returns:
            tuple: the sum and its LayerNorm, [..., D] both.
        """

    def attention(self, lengths: Tensor, extent: int) -> Attend:
        """The attention of all layers of one step.

        Args:
            lengths: [rows], on the device.
            extent: a bound of the lengths that the host knows.
        """

    def draw(self, logits: Tensor, parameters: SlotParameters) -> Tensor:
        """Draws a column: logits [slots, 2, K, card], the conditional row first -> tokens [slots, K]."""

    def int8_linear(self, x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
        """Multiplies by an int8 weight.

        Args:
            x: [..., in].
            weight: [out, in] in int8.
            scales: [out] in fp32, one for each output.

        Returns:
            Tensor: [..., out] in the dtype of x.
        """


class PlainOperations:
    """Operations in plain PyTorch, on any device."""

    reads_lengths = False

    def add_norm(
        self, x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        if delta is not None:
            x = x + delta
        return x, F.layer_norm(x, weight.shape, weight, bias, eps).to(dtype)

    def attention(self, lengths: Tensor, extent: int) -> Attend:
        positions = torch.arange(extent, device=lengths.device)
        unseen = positions >= lengths[:, None].clamp(min=1)  # a softmax over nothing would be NaN
        empty = (lengths == 0)[:, None, None, None]
        rows, last = torch.arange(len(lengths), device=lengths.device), lengths - 1

        @cache
        def mask(dtype: torch.dtype) -> Tensor:
            """[rows, extent] to be added to scores:

            SDPA would make the same of a bool one, in every layer.
            """
            return torch.zeros(unseen.shape, dtype=dtype, device=unseen.device).masked_fill(
                unseen, -torch.inf
            )

        def attend(
            query: Tensor, keys: Tensor, values: Tensor, new: tuple[Tensor, Tensor] | None = None
        ) -> Tensor:
            caches = len(keys)
            if new is not None:
                keys[rows, :, last], values[rows, :, last] = new[0][:, :, 0], new[1][:, :, 0]
            by_cache = query.view(caches, -1, *query.shape[1:])[:, :, :, 0]  # [caches, sharing, heads, head]
            found = F.scaled_dot_product_attention(
                by_cache.transpose(1, 2),
                keys[:, :, :extent],
                values[:, :, :extent],
                attn_mask=mask(query.dtype).view(caches, 1, -1, extent),
            )
            found = found.transpose(1, 2).flatten(0, 1)[:, :, None]
            return found if new is not None else found.masked_fill(empty, 0)

        return attend

    def draw(self, logits: Tensor, parameters: SlotParameters) -> Tensor:
        mixed = mix(logits[:, 0], logits[:, 1], parameters.guidance[:, None, None])
        return draw_counted(mixed, parameters)

    def int8_linear(self, x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
        """Widens the weight first, which writes and reads more than the weight in half precision is."""
        return F.linear(x, (weight * scales[:, None]).to(x.dtype))


PLAIN: Operations = PlainOperations()
