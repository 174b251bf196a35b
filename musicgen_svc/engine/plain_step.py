"""The step of a static batch in plain PyTorch, on any device. It defines the correct results."""

import torch
import torch.nn.functional as F
from torch import Tensor

from musicgen_svc.engine.batch import UNKNOWN
from musicgen_svc.engine.decoder import Decoder
from musicgen_svc.engine.sampling import SlotParameters, draw_counted, mix
from musicgen_svc.engine.state import ActiveExtent, DeviceState


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

    def compile(self, state: DeviceState, slots: int) -> None:
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
    """Attention of one query per row to the used positions of a cache, whose number is on the device."""

    def __init__(self, lengths: Tensor, extent: int, dtype: torch.dtype) -> None:
        """Makes the mask [rows, extent] that is added to the scores.

        Args:
            lengths: [rows] how many positions each row has used.
            extent: an upper bound of the lengths, which the host knows.
            dtype: that of the queries. A bool mask would be converted to it in every layer.
        """
        positions = torch.arange(extent, device=lengths.device)
        masked = positions >= lengths[:, None].clamp(min=1)  # a softmax over no position would be NaN
        self._mask = torch.zeros(masked.shape, dtype=dtype, device=masked.device)
        self._mask.masked_fill_(masked, -torch.inf)
        self._empty = (lengths == 0)[:, None, None, None]

    def attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Computes the attention, which is zero for a row without positions.

        Args:
            query: [rows, heads, 1, head].
            keys, values: [caches, heads, capacity, head]; `rows / caches` consecutive rows share one.

        Returns:
            Tensor: [rows, heads, 1, head].
        """
        caches, extent = len(keys), self._mask.shape[1]
        by_cache = query.view(caches, -1, *query.shape[1:])[:, :, :, 0]  # [caches, sharing, heads, head]
        attended = F.scaled_dot_product_attention(
            by_cache.transpose(1, 2),
            keys[:, :, :extent],
            values[:, :, :extent],
            attn_mask=self._mask.view(caches, 1, -1, extent),
        )
        return attended.transpose(1, 2).flatten(0, 1)[:, :, None].masked_fill(self._empty, 0)


def _column_index(state: DeviceState, column: Tensor) -> Tensor:
    """Expands one column number per slot [slots] to an index [slots, K, 1] into the columns."""
    return column[:, None, None].expand(-1, state.columns.shape[1], 1)
