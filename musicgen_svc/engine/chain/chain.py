"""A decoding step as a chain of Triton kernels, each of which starts before the one in front of it has ended.

A step of one request computes two rows only, so its time is that of reading the weights and of launching. A
layer takes eight launches with cross-attention and five without it; more rows take up to three more, see
`tiles.py`. On GPUs of compute capability 9.0 and later, a launch begins while the one in front of it runs: it
loads its weights, and then waits ("programmatic dependent launch"). So before its wait it may read only what
no launch of the same step writes.

The kernels are compiled at their first launch, for each shape. If `TRITON_INTERPRET=1` is in the environment
when Triton is imported, they run on a CPU, slowly. The tests without a GPU use this.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from musicgen_svc.engine.batch import UNKNOWN
from musicgen_svc.engine.chain import attention, embedding, product, sampling
from musicgen_svc.engine.chain.launches import Compilations, Launches
from musicgen_svc.engine.chain.tiles import (
    FEW_ROWS,
    LEAST_CAPABILITY,
    TEXT_SPLIT,
    WHOLE,
    Split,
    attention_split,
    product_tile,
)  # fmt: skip
from musicgen_svc.engine.decoder import Decoder
from musicgen_svc.engine.layers import Norm
from musicgen_svc.engine.projections import Projection, merged
from musicgen_svc.engine.sampling_params import GREEDY_BELOW
from musicgen_svc.engine.state import ActiveExtent, DeviceState
from musicgen_svc.runtime.ticks import Check

DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
EMBEDDED = 256
"""How many numbers of the residual stream a program of the first launch makes."""
SORTED = 16
"""How many tokens a program sorts."""


class Buffers:
    """What the launches of a step pass to each other.

    Attributes:
        stream: [rows, D] the residual stream in fp32, two rows per slot.
        normed: [rows, D] its LayerNorm, if a launch of its own computes it.
        qkv: [rows, 3, D] queries, keys and values. Of cross-attention only [slots, D] queries.
        attended: [rows, D], or parts [rows, heads, parts, head] and sums [rows, heads, parts, 2] in fp32.
        inner: [rows, inner D] the activations of the feed-forward block.
        logits: [slots, 2, K, card].
        probabilities, ordered: [slots, K, card] in fp32, by token and in descending order.
        tokens: [slots, K, card] the token of each place in `ordered`.
        most_likely: [slots, K] tokens.
        column: [slots] the column that is drawn.
    """

    def __init__(self, decoder: Decoder, slots: int) -> None:
        """Allocates the buffers for this many slots."""

        def zeros(*shape: int, dtype: torch.dtype = decoder.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=decoder.device)

        rows, dim, heads = 2 * slots, decoder.dim, decoder.heads
        parts = max(r * attention_split(r, heads, dim).parts for r in range(1, rows + 1))
        self.stream = zeros(rows, dim, dtype=torch.float32)
        self.normed, self.attended = zeros(rows, dim), zeros(rows, dim)
        self.parts = zeros(parts, dim, dtype=torch.float32)
        self.sums = zeros(parts, heads, 2, dtype=torch.float32)
        self.qkv, self.inner = zeros(rows, 3, dim), zeros(rows, decoder.inner_dim)
        drawn = slots, decoder.codebooks, decoder.card
        self.logits = zeros(slots, 2, *drawn[1:])
        self.probabilities, self.ordered = (zeros(*drawn, dtype=torch.float32) for _ in range(2))
        self.tokens = zeros(*drawn, dtype=torch.int32)
        self.most_likely = zeros(*drawn[:2], dtype=torch.int32)
        self.column = zeros(slots, dtype=torch.long)


class Rows(NamedTuple):
    """The rows of the residual stream that a launch computes: row i is row i * step of the stream."""

    number: int
    step: int


class Chain:
    """The steps of one decoder as kernels, as the protocol `Step`."""

    name = "kernels"
    reads_lengths = True

    def __init__(self, decoder: Decoder, slots: int) -> None:
        """Allocates what the launches of a step pass to each other.

        Args:
            decoder: its weights are used. Its embeddings become views of one tensor.
            slots: the most slots that a step computes.

        Raises:
            ValueError: the kernels cannot compute this decoder. The error says why.
        """
        head = decoder.head_dim
        if head & (head - 1):
            raise ValueError(f"the attention heads are {head} wide, which is no power of two")
        if decoder.activation is not F.gelu:
            raise ValueError("the activation is not GELU")
        on_gpu = decoder.device.type == "cuda"
        if on_gpu and torch.cuda.get_device_capability(decoder.device) < LEAST_CAPABILITY:
            raise ValueError("the GPU's compute capability is below 8.0")
        self._decoder = decoder
        self._buffers = Buffers(decoder, slots)
        self._embeddings = merged([embedding.weight for embedding in decoder.lm.emb])

    def logits(self, state: DeviceState, extent: ActiveExtent) -> Tensor:
        """Computes the logits, as `Step.logits`. The next step overwrites them."""
        self._forward(Launches(self._decoder.device), state, extent.slots)
        return self._buffers.logits[: extent.slots]

    def draw(self, state: DeviceState, logits: Tensor, slots: slice) -> None:
        """Draws the next column of some slots, as `Step.draw`."""
        self._draw(Launches(self._decoder.device), state, logits.contiguous(), slots)

    def compile(self, state: DeviceState, slots: int, check: Check) -> None:
        """Compiles what a step of the leading slots launches, as `Step.compile`."""
        launches = Compilations(self._decoder.device, check)
        self._forward(launches, state, slots)
        self._draw(launches, state, self._buffers.logits[:slots], slice(slots))

    def _forward(self, launches: Launches, state: DeviceState, slots: int) -> None:
        """Computes the logits of the leading slots into the buffer."""
        decoder, buffers = self._decoder, self._buffers
        step = _Launcher(self, launches, state, slots)
        both, conditional = Rows(2 * slots, 1), Rows(slots, 2)
        with launches.current():
            step.embed(self._embeddings)
            for index, layer in enumerate(decoder.layers):
                step.norm_product(both, layer.norm, layer.qkv, buffers.qkv)
                split = step.attend(index)
                step.product(both, split, layer.out, buffers.stream, "add")
                if layer.cross_norm is not None and layer.cross_query is not None:
                    # Without biases, the attention of the null row is exactly zero, see `architecture.py`.
                    assert layer.cross_out is not None
                    step.norm_product(conditional, layer.cross_norm, layer.cross_query, buffers.qkv)
                    split = step.cross_attend(index)
                    step.product(conditional, split, layer.cross_out, buffers.stream, "add")
                step.norm_product(both, layer.ff_norm, layer.ff_in, buffers.inner, "gelu")
                step.product(both, buffers.inner, layer.ff_out, buffers.stream, "add")
            step.norm_product(both, decoder.out_norm, decoder.output_heads, buffers.logits)

    def _draw(self, launches: Launches, state: DeviceState, logits: Tensor, slots: slice) -> None:
        """Draws the next column of some slots from contiguous logits [slots, 2, K, card]."""
        buffers = self._buffers
        count, _, codebooks, card = logits.shape
        row = triton.next_power_of_2(card)
        with launches.current():
            launches(
                sampling.soften, (count, codebooks), logits,
                *(each[slots] for each in (state.guidance, state.temperature, state.filled)),
                buffers.probabilities, buffers.most_likely, buffers.column,
                GREEDY_BELOW=GREEDY_BELOW, CARD=card, ROW=row, warps=8,
            )  # fmt: skip
            launches(
                sampling.order, (count * codebooks, triton.cdiv(card, SORTED)),
                buffers.probabilities, buffers.ordered, buffers.tokens, CARD=card, TOKENS=SORTED, ROW=row,
                warps=4,
            )  # fmt: skip
            launches(
                sampling.draw, (count, codebooks),
                buffers.ordered, buffers.tokens, buffers.most_likely, buffers.column,
                *(each[slots] for each in (state.temperature, state.top_k, state.top_p, state.seed)),
                *(each[slots] for each in (state.filled, state.end, state.columns)),
                state.columns.shape[2] - 1, UNKNOWN=UNKNOWN, GREEDY_BELOW=GREEDY_BELOW, CARD=card, ROW=row,
                warps=8,
            )  # fmt: skip


class _Launcher:
    """Launches the kernels of one forward pass, which read and write the buffers of a chain."""

    def __init__(self, chain: Chain, launches: Launches, state: DeviceState, slots: int) -> None:
        """A pass of the leading slots of a state."""
        self._decoder, self._buffers = chain._decoder, chain._buffers
        self._launches, self._state, self._slots = launches, state, slots

    def embed(self, embeddings: Tensor) -> None:
        """Begins the residual stream. All earlier work must have ended, so that others may read it early."""
        state, dim = self._state, self._decoder.dim
        self._launches(
            embedding.embed, (self._slots, triton.cdiv(dim, EMBEDDED)),
            state.columns, state.filled, state.prefix_length, embeddings, self._decoder.position_embeddings,
            self._buffers.stream, state.columns.stride(1), state.capacity.positions,
            CODEBOOKS=self._decoder.codebooks, CARD=self._decoder.card, DIM=dim, BLOCK=EMBEDDED,
            warps=2, first=True,
        )  # fmt: skip

    def norm_product(
        self, rows: Rows, norm: Norm, weight: Projection, out: Tensor, behind: str = "store"
    ) -> None:
        """Multiplies the LayerNorm of the residual stream by a weight, in one launch or two."""
        if rows.number <= FEW_ROWS and self._decoder.dim <= WHOLE:
            self.product(rows, norm, weight, out, behind)
            return
        dim = self._decoder.dim
        # Four warps would spill registers on GPUs of compute capability 8.6 and 8.9.
        self._launches(
            product.norm, (rows.number,), self._buffers.stream, norm.weight, norm.bias, self._buffers.normed,
            norm.eps, DIM=dim, BLOCK=triton.next_power_of_2(dim), ROW_STEP=rows.step, warps=8,
        )  # fmt: skip
        self.product(rows, self._buffers.normed, weight, out, behind)

    def product(
        self, rows: Rows, front: Norm | Split | Tensor, weight: Projection, out: Tensor, behind: str
    ) -> None:
        """Multiplies something by a weight.

        Args:
            rows: which rows are computed.
            front: a LayerNorm of the residual stream, or how the attention that is multiplied was divided, or
                what is multiplied, [rows, inputs].
            weight: the product, whose matrix is not packed.
            out: what the product is written to.
            behind: "store", "gelu" or "add", as in `product.product`.
        """
        buffers, matrix = self._buffers, weight.matrix
        assert matrix is not None, "this product's weight is packed"
        outputs, inputs = matrix.weight.shape
        tile = product_tile(inputs, outputs, rows.number)
        x, kind, parts = buffers.attended, "plain", 1
        norm = None
        if isinstance(front, Norm):
            x, kind, norm = buffers.stream, "norm", front
        elif isinstance(front, Tensor):
            x = front
        elif front.parts > 1:
            x, kind, parts = buffers.parts, "parts", front.parts
        self._launches(
            product.product, (triton.cdiv(outputs, tile.outputs),),
            x, buffers.sums, norm and norm.weight, norm and norm.bias, matrix.weight, matrix.scales, out,
            norm.eps if norm else 0.0, FRONT=kind, BEHIND=behind, INPUTS=inputs, OUTPUTS=outputs,
            ROWS=rows.number, ROW_STEP=rows.step, HEAD=self._decoder.head_dim, PARTS=parts,
            DTYPE=DTYPES[self._decoder.dtype], INT8=matrix.scales is not None, BLOCK_OUT=tile.outputs,
            BLOCK_IN=tile.inputs, WARPS=tile.warps, warps=tile.warps,
        )  # fmt: skip

    def attend(self, layer: int) -> Split:
        """Computes self-attention of both rows of each slot, and returns how it is divided."""
        state = self._state
        split = attention_split(2 * self._slots, self._decoder.heads, self._decoder.dim)
        out = self._buffers.attended if split.parts == 1 else self._buffers.parts
        self._attend(split, 2 * self._slots, out, state.keys[layer], state.values[layer], own=True)
        return split

    def cross_attend(self, layer: int) -> Split:
        """Computes the attention of each slot's conditional row to its text."""
        state = self._state
        assert state.text_keys is not None and state.text_values is not None
        keys, values = state.text_keys[layer], state.text_values[layer]
        self._attend(TEXT_SPLIT, self._slots, self._buffers.attended, keys, values, own=False)
        return TEXT_SPLIT

    def _attend(
        self, split: Split, rows: int, out: Tensor, keys: Tensor, values: Tensor, *, own: bool
    ) -> None:
        """Attends to a cache: to the request's own positions, or to its text."""
        state, heads = self._state, self._decoder.heads
        self._launches(
            attention.attend, (split.parts, heads, rows), self._buffers.qkv, keys, values,
            state.prefix_length, state.filled, state.text_length, out, self._buffers.sums, keys.shape[2],
            SELF=own, HEADS=heads, HEAD=self._decoder.head_dim, PARTS=split.parts, TILE=split.positions,
            LEAST=attention.LEAST_SHARE, warps=split.warps,
        )  # fmt: skip
