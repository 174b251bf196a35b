"""The step of a static batch in plain PyTorch, on any device. It defines the correct results."""

import torch
import torch.nn.functional as F
from torch import Tensor

from musicgen_svc.engine.batch import UNKNOWN
from musicgen_svc.engine.decoder import Decoder
from musicgen_svc.engine.sampling import SlotParameters, draw_counted, mix
from musicgen_svc.engine.state import ActiveExtent, DeviceState
from musicgen_svc.runtime.ticks import Check

PART = 256
"""Into how many positions a cache is divided, if its extent is a multiple of it."""
MASKED = -30000.0
"""What is added to the score of a position that is not used.

It is finite, so that a part without positions has a softmax, and float16 can represent it.
"""


class PlainStep:
    """Steps of one decoder, as the protocol `Step`. Their attention reads the whole extent, under a mask."""

    name = "plain"
    reads_lengths = False

    def __init__(self, decoder: Decoder) -> None:
        """Makes the steps of a decoder."""
        self._decoder = decoder

    def logits(self, state: DeviceState, extent: ActiveExtent) -> Tensor:
        """Computes the logits that follow the last columns, as `Step.logits`."""
        slots = slice(extent.slots)
        last = state.columns[slots].gather(2, _column_index(state, state.filled[slots] - 1))  # [slots, K, 1]
        slot_of_row = torch.arange(2 * extent.slots, device=last.device) // 2
        logits = self._decoder.logits(last, slot_of_row, StaticAttention(state, extent))
        return logits.view(-1, 2, *logits.shape[1:])

    def compile(self, state: DeviceState, slots: int, check: Check) -> None:
        """Does nothing, as nothing is compiled."""

    def draw(self, state: DeviceState, logits: Tensor, slots: slice) -> None:
        """Draws the next column of some slots, as `Step.draw`."""
        filled, end = state.filled[slots], state.end[slots]
        parameters = SlotParameters(
            state.guidance[slots], state.temperature[slots], state.top_k[slots], state.top_p[slots],
            state.seed[slots], filled,
        )  # fmt: skip
        mixed = mix(logits[:, 0], logits[:, 1], parameters.guidance[:, None, None])
        drawn = draw_counted(mixed, parameters)
        running = filled < end
        index = _column_index(state, torch.where(running, filled, state.capacity.columns))
        own = state.columns[slots]
        given = own.gather(2, index)
        own.scatter_(2, index, torch.where(given == UNKNOWN, drawn[..., None], given))
        filled.add_(running)


class StaticAttention:
    """The attention of one step: each row of the leading slots attends to what it has used of the buffers."""

    text_rows = None
    """All rows. A row without a text has the text length 0, which costs less than to leave the row out."""

    def __init__(self, state: DeviceState, extent: ActiveExtent) -> None:
        """Reads the lengths, which are on the device, for all layers of the step."""
        self._state, self._rows = state, slice(2 * extent.slots)
        last = state.position()[: extent.slots, None].expand(-1, 2).flatten()  # [rows]
        self.positions = last[:, None]
        self._own = _Masked(last + 1, extent.positions, state.keys.dtype)
        self._text = _Masked(state.text_length[self._rows], extent.text, state.keys.dtype)
        self._last = torch.arange(len(last), device=last.device), slice(None), last

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Stores the key and value, and computes self-attention, as `Attention.attend` with T = 1."""
        keys, values = self._state.keys[layer, self._rows], self._state.values[layer, self._rows]
        keys[self._last], values[self._last] = key[:, :, 0], value[:, :, 0]
        return self._own.attend(query, keys, values)

    def cross_attend(self, layer: int, query: Tensor) -> Tensor:
        """Attends to the text, as `Attention.cross_attend` with T = 1.

        Both rows of a slot share the slot's text, whose length for the null row is 0.
        """
        assert self._state.text_keys is not None and self._state.text_values is not None
        slots = slice(len(query) // 2)
        keys, values = self._state.text_keys[layer, slots], self._state.text_values[layer, slots]
        return self._text.attend(query, keys, values)


class _Masked:
    """Attention of one query per row to the used positions of a cache, whose number is on the device.

    A long cache is read in parts, because PyTorch's attention gives each row and head one block of a GPU, and
    leaves the others idle: it took 1.3 of the 3.2 ms of a step of `small` on an H200.
    """

    def __init__(self, lengths: Tensor, extent: int, dtype: torch.dtype) -> None:
        """Makes the mask [rows, extent] that is added to the scores.

        Args:
            lengths: [rows] how many positions each row has used.
            extent: an upper bound of the lengths, which the host knows.
            dtype: that of the queries. A bool mask would be converted to it in every layer.
        """
        positions = torch.arange(extent, device=lengths.device)
        self._mask = torch.zeros(len(lengths), extent, dtype=dtype, device=lengths.device)
        self._mask.masked_fill_(positions >= lengths[:, None], MASKED)
        self._empty = (lengths == 0)[:, None, None, None]
        self._parts = extent // PART if extent % PART == 0 else 1
        self._by_parts: Tensor | None = None

    def attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Computes the attention, which is zero for a row without positions.

        Args:
            query: [rows, heads, 1, head].
            keys, values: [caches, heads, capacity, head]; `rows / caches` consecutive rows share one.

        Returns:
            Tensor: [rows, heads, 1, head].
        """
        caches, extent = len(keys), self._mask.shape[1]
        if self._parts > 1 and caches == len(query):
            return self._attend_in_parts(query, keys, values)
        by_cache = query.view(caches, -1, *query.shape[1:])[:, :, :, 0]  # [caches, sharing, heads, head]
        attended = F.scaled_dot_product_attention(
            by_cache.transpose(1, 2),
            keys[:, :, :extent],
            values[:, :, :extent],
            attn_mask=self._mask.view(caches, 1, -1, extent),
        )
        return attended.transpose(1, 2).flatten(0, 1)[:, :, None].masked_fill(self._empty, 0)

    def _attend_in_parts(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attends to each part of a cache, and adds up the results by the parts' shares of the softmax."""
        rows, heads, extent = len(query), query.shape[1], self._mask.shape[1]

        def parts_of(cache: Tensor) -> Tensor:
            """[rows, heads, capacity, head] -> [rows * heads, parts, positions, head], without a copy."""
            return cache.flatten(0, 1)[:, :extent].view(rows * heads, self._parts, -1, cache.shape[-1])

        found, shares = _attention_and_log_sums(
            query.flatten(0, 1)[:, None].expand(-1, self._parts, -1, -1),
            parts_of(keys),
            parts_of(values),
            self._mask_of_parts(heads),
        )
        weights = shares.softmax(dim=1)[:, :, None]
        return (found[:, :, 0] * weights).sum(dim=1).to(query.dtype).view(rows, heads, 1, -1)

    def _mask_of_parts(self, heads: int) -> Tensor:
        """The mask for each row, head and part: [rows * heads, parts, 1, positions], made once."""
        if self._by_parts is None:
            repeated = self._mask[:, None].expand(-1, heads, -1).flatten(0, 1)
            self._by_parts = repeated.view(len(repeated), self._parts, 1, -1)
        return self._by_parts


def _attention_and_log_sums(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Computes attention, and the logarithm of the sum of its weights before they were normalized.

    `F.scaled_dot_product_attention` calls one of these operations, and drops the logarithms.

    Args:
        query: [B, H, 1, head].
        keys, values: [B, H, positions, head].
        mask: [B, H, 1, positions], added to the scores.

    Returns:
        tuple: [B, H, 1, head] and [B, H] in fp32.
    """
    ops = torch.ops.aten
    if query.device.type == "cuda":
        found, sums, *_ = ops._scaled_dot_product_efficient_attention(query, keys, values, mask, True)
        return found, sums[..., 0]  # it is padded to 32 queries
    found, sums = ops._scaled_dot_product_flash_attention_for_cpu(query, keys, values, attn_mask=mask)
    return found, sums[..., 0]


def _column_index(state: DeviceState, column: Tensor) -> Tensor:
    """Expands one column number per slot [slots] to an index [slots, K, 1] into the columns."""
    return column[:, None, None].expand(-1, state.columns.shape[1], 1)
