"""Checks that each kernel of a chain gives the results of the plain computation.

`test_chain.py` runs the checks on a GPU, if there is one, and on a CPU with Triton's interpreter. The
interpreter must be chosen in the environment before Triton is imported, so for it this file is run as a
program:

    TRITON_INTERPRET=1 python chain_checks.py [--all] [CHECK ...]

It prints one line of JSON for each check: its name, how many cases it had, the seconds that they took, and
the first failure or null. The interpreter is slow, so on a CPU only a few programs of a large grid are run:
they compute the first outputs of a product, or the first head of an attention.
"""

import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count, cycle
from itertools import product as cartesian
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import chain_steps
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.random_models import MODELS, MONO, STEREO, language_model
from musicgen_svc.engine.batch import UNKNOWN
from musicgen_svc.engine.chain.chain import Buffers, Chain, Rows, _Launcher
from musicgen_svc.engine.chain.launches import Launches
from musicgen_svc.engine.chain.tiles import Split, attention_split, product_tile
from musicgen_svc.engine.decoder import Decoder
from musicgen_svc.engine.layers import Norm
from musicgen_svc.engine.plain_step import PlainStep, StaticAttention
from musicgen_svc.engine.projections import Matrix, Projection
from musicgen_svc.engine.sampling_params import SamplingParams
from musicgen_svc.engine.state import ActiveExtent, Capacity, DeviceState, Step

Case = tuple[Any, ...]
Weights = Literal["float16", "bfloat16", "int8"]

HEADS = {1024: 16, 1536: 24, 2048: 32}
"""The dims of the released models, and their heads."""
ROWS = range(1, 33)
SLOTS = range(1, 17)
LENGTHS = (1, 127, 128, 129, 1500, 2048)
TEXTS = (0, 1, 7, 63, 64, 65, 127, 301)
WEIGHTS: tuple[Weights, ...] = ("float16", "int8")
GARBAGE = 1000.0
PROGRAMS = 2
"""How many programs of a product are run on a CPU."""
CAPACITY = 2048


@dataclass(frozen=True)
class Shape:
    """What the launches of a chain read of a decoder besides its weights."""

    dim: int
    device: torch.device
    codebooks: int = 4
    card: int = 2048
    dtype: torch.dtype = torch.float16
    position_embeddings: Tensor | None = None
    layers: tuple[None] = (None,)
    has_text: bool = True

    @property
    def heads(self) -> int:
        return HEADS[self.dim]

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def inner_dim(self) -> int:
        return 4 * self.dim

    def reserve(self, positions: int) -> None:
        pass


class FewPrograms(Launches):
    """Launches the first programs of a grid only, on a CPU."""

    LIMITS: ClassVar[dict[str, tuple[int | None, ...]]] = {"product": (PROGRAMS,), "attend": (None, 1)}

    def __call__(self, kernel: Any, grid: tuple[int, ...], *arguments: object, **rest: Any) -> None:
        limits = self.LIMITS.get(kernel.__name__, ()) if self._device.type == "cpu" else ()
        few = [min(n, limits[at] or n) if at < len(limits) else n for at, n in enumerate(grid)]
        super().__call__(kernel, tuple(few), *arguments, **rest)


def launcher(shape: Shape, slots: int, state: DeviceState | None = None) -> tuple[_Launcher, Buffers]:
    """What launches the kernels for a shape, and its buffers, which are full of garbage."""
    buffers = Buffers(shape, slots)  # type: ignore[arg-type]
    for buffer in vars(buffers).values():
        buffer.fill_(GARBAGE)
    chain = SimpleNamespace(_decoder=shape, _buffers=buffers)
    return _Launcher(chain, FewPrograms(shape.device), state, slots), buffers  # type: ignore[arg-type]


def noise(*size: int, like: Shape, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    source = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(size, generator=source, device=like.device).to(dtype)


def close(found: Tensor, expected: Tensor, tolerance: float = 2e-3) -> None:
    """Compares with an expected value in a higher precision, relative to the largest one of a row."""
    scale = expected.abs().amax(dim=-1, keepdim=True).clamp_min(1e-6)
    error = ((found.to(expected.dtype) - expected) / scale).abs().max()
    assert error <= tolerance, f"a result differs by {float(error):.2g}"  # fails if it is NaN


# --- products -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """One of the products of a step."""

    front: Literal["norm", "attention", "plain"]
    behind: Literal["store", "gelu", "add"]
    widths: tuple[int, int]  # inputs and outputs, in dims
    step: int = 1


PRODUCTS = {
    "qkv": Kind("norm", "store", (1, 3)),
    "out": Kind("attention", "add", (1, 1)),
    "cross_query": Kind("norm", "store", (1, 1), step=2),
    "cross_out": Kind("plain", "add", (1, 1), step=2),
    "ff_in": Kind("norm", "gelu", (1, 4)),
    "ff_out": Kind("plain", "add", (4, 1)),
    "heads": Kind("norm", "store", (1, 0)),
    "stereo heads": Kind("norm", "store", (1, 0)),
}


def matrix_of(outputs: int, inputs: int, live: int, weights: Weights, shape: Shape) -> Matrix:
    """A weight whose first `live` rows have values."""
    dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}[weights]
    matrix = torch.zeros(outputs, inputs, dtype=dtype, device=shape.device)
    values = noise(live, inputs, like=shape, seed=1) / inputs**0.5
    if weights != "int8":
        matrix[:live] = values.to(dtype)
        return Matrix(matrix)
    scales = torch.ones(outputs, device=shape.device)
    scales[:live] = values.abs().amax(dim=1) / 127
    matrix[:live] = (values / scales[:live, None]).round().to(dtype)
    return Matrix(matrix, scales)


def product_of(device: torch.device, dim: int, rows: int, name: str, weights: Weights) -> None:
    """A product with what stands before and behind it, in the tiles that the table has for it."""
    kind = PRODUCTS[name]
    shape = Shape(dim, device, codebooks=8 if name == "stereo heads" else 4)
    step, buffers = launcher(shape, max(SLOTS))  # so that what is written to other rows is seen
    inputs, outputs = kind.widths[0] * dim, (kind.widths[1] * dim or shape.codebooks * shape.card)
    live = outputs if device.type != "cpu" else PROGRAMS * product_tile(inputs, outputs, rows).outputs
    matrix = matrix_of(outputs, inputs, live, weights, shape)
    weight = Projection(lambda x: x, matrix)
    own = Rows(rows, kind.step)
    stream = 3 + noise(rows, dim, like=shape)
    beyond = slice(rows * kind.step, None)
    buffers.stream[: rows * kind.step : kind.step] = stream
    buffers.stream[beyond] = torch.nan
    before = buffers.stream.clone()
    if kind.front == "norm":
        module = nn.LayerNorm(dim, device=device)
        nn.init.normal_(module.weight, 1, 0.1, generator=torch.Generator(device).manual_seed(2))
        nn.init.normal_(module.bias, 1, generator=torch.Generator(device).manual_seed(3))
        norm = Norm(module, shape.dtype)
        out = {"gelu": buffers.inner, "store": buffers.qkv}[kind.behind]
        if kind.widths[1] == 0:
            out = buffers.logits
        step.norm_product(own, norm, weight, out, kind.behind)
        _, front = norm(stream, None)
    else:
        out = buffers.stream
        given: Split | Tensor = (
            Split(1, 0, 0) if name == "cross_out" else attention_split(rows, shape.heads, shape.dim)
        )
        x = buffers.attended if kind.widths[0] == 1 else buffers.inner
        front = noise(rows, inputs, like=shape, dtype=shape.dtype, seed=4)
        if isinstance(given, Split) and kind.front == "attention" and given.parts > 1:
            front = parts_of(buffers, rows, shape, given.parts).to(shape.dtype)
        else:
            x.fill_(torch.nan)
            x[:rows] = front
        step.product(own, given if kind.widths[0] == 1 else buffers.inner, weight, out, kind.behind)

    exact = front.to(torch.bfloat16 if weights == "bfloat16" else front.dtype).double()
    exact = exact @ matrix.weight[:live].double().T
    if matrix.scales is not None:
        exact = exact * matrix.scales[:live].double()
    if kind.behind == "gelu":
        exact = F.gelu(exact.to(shape.dtype).double())
    if kind.behind == "add":
        close(buffers.stream[: rows * kind.step : kind.step, :live] - stream[:, :live], exact)
        before[: rows * kind.step : kind.step, :live] = buffers.stream[: rows * kind.step : kind.step, :live]
        assert same(buffers.stream, before), "another cell of the residual stream was written"
        return
    flat = out.view(-1)
    close(flat[: rows * outputs].view(rows, outputs)[:, :live], exact, 4e-3)
    flat[: rows * outputs].view(rows, outputs)[:, :live] = GARBAGE
    assert (flat == GARBAGE).all(), "another cell of the result was written"
    assert same(buffers.stream, before), "the residual stream was written"


def parts_of(buffers: Buffers, rows: int, shape: Shape, parts: int) -> Tensor:
    """Fills the buffers with the parts of an attention, and returns their combination [rows, D]."""
    size = rows, shape.heads, parts
    buffers.parts.fill_(torch.nan)
    buffers.sums.fill_(torch.nan)
    found = noise(*size, shape.head_dim, like=shape)
    high, total = 3 * noise(*size, like=shape, seed=1), 1 + noise(*size, like=shape, seed=2).abs()
    if rows > 1:  # parts without positions, as for a short request, and a row without any
        found[0, :, 1:], high[0, :, 1:], total[0, :, 1:] = 0, -1e30, 0
        found[-1], high[-1], total[-1] = 0, -1e30, 0
    buffers.parts.view(-1)[: found.numel()] = found.flatten()
    buffers.sums.view(-1)[: 2 * high.numel()] = torch.stack([high, total], dim=-1).flatten()
    return combination(found, high, total).view(rows, shape.dim)


def combination(weighted: Tensor, high: Tensor, total: Tensor) -> Tensor:
    """The result of an attention of which each part has a share: [rows, heads, head].

    Args:
        weighted: [rows, heads, parts, head] sums of values.
        high, total: [rows, heads, parts] the highest score and the sum of the weights.
    """
    weight = torch.exp(high - high.amax(dim=2, keepdim=True))
    return (weighted * weight[..., None]).sum(dim=2) / (total * weight).sum(dim=2).clamp_min(1)[..., None]


def same(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors are bitwise the same, where NaN is NaN."""
    return torch.equal(found.nan_to_num(7777.0), expected.nan_to_num(7777.0))


# --- attention ----------------------------------------------------------------------------------


def state_of(shape: Shape, slots: int, heads: int, **capacity: int) -> DeviceState:
    """A state whose caches have NaN in the first heads, which are those that are run."""
    state = DeviceState(shape, Capacity(slots, columns=8, **capacity))  # type: ignore[arg-type]
    for buffer in caches(state):
        buffer[:, :, :heads] = torch.nan
    return state


def caches(state: DeviceState) -> list[Tensor]:
    assert state.text_keys is not None and state.text_values is not None
    return [state.keys, state.values, state.text_keys, state.text_values]


def oracle(state: DeviceState, heads: int) -> StaticAttention:
    """The plain attention, in fp32, of the first heads. Where the state has NaN, it has zeros."""
    plain = SimpleNamespace(**vars(state))
    for name in ("keys", "values", "text_keys", "text_values"):
        setattr(plain, name, getattr(state, name)[:, :, :heads].float().nan_to_num(0.0))
    plain.position = partial(DeviceState.position, plain)  # type: ignore[arg-type]
    capacity = state.capacity
    return StaticAttention(plain, ActiveExtent(capacity.slots, capacity.positions, capacity.text))  # type: ignore[arg-type]


def attention_of(device: torch.device, dim: int, lengths: tuple[int, ...], parts: int) -> None:
    """Self-attention of slots with these lengths, in this number of parts."""
    shape = Shape(dim, device)
    heads = shape.heads if device.type != "cpu" else 1
    rows, head = 2 * len(lengths), shape.head_dim
    state = state_of(shape, len(lengths), heads, positions=max(LENGTHS), text=1)
    for slot, length in enumerate(lengths):
        state.prefix_length[slot] = length // 3
        state.filled[slot] = length - length // 3
        for seed, cache in enumerate((state.keys, state.values)):
            past = noise(2, heads, length - 1, head, like=shape, seed=2 * slot + seed)
            cache[0, 2 * slot : 2 * slot + 2, :heads, : length - 1] = past
    step, buffers = launcher(shape, len(lengths), state)
    buffers.parts, buffers.sums = (
        torch.full((rows * parts * n,), GARBAGE, device=device) for n in (dim, 2 * shape.heads)
    )
    qkv = noise(rows, 3, shape.heads, head, like=shape, dtype=shape.dtype, seed=99)
    buffers.qkv.copy_(qkv.view(rows, 3, dim))
    plain = oracle(state, heads)
    query, key, value = (qkv[:, at, :heads, None].float() for at in range(3))
    exact = plain.attend(0, query, key, value)[:, :, 0]  # [rows, heads, head]
    text = [cache.clone() for cache in caches(state)[2:]]

    split = attention_split(rows, shape.heads, shape.dim)._replace(parts=parts)
    out = buffers.attended if parts == 1 else buffers.parts
    step._attend(split, rows, out, state.keys[0], state.values[0], own=True)
    if parts == 1:
        found = buffers.attended.view(rows, shape.heads, head)
        others = [found[:, heads:], buffers.parts, buffers.sums]
    else:
        weighted = buffers.parts.view(rows, shape.heads, parts, head)
        sums = buffers.sums.view(rows, shape.heads, parts, 2)
        found = combination(weighted, sums[..., 0], sums[..., 1])
        others = [weighted[:, heads:], sums[:, heads:], buffers.attended]
    close(found[:, :heads], exact)
    assert all((other == GARBAGE).all() for other in others), "another cell of the result was written"
    for cache, expected in zip(caches(state)[:2], (plain._state.keys, plain._state.values), strict=True):
        assert torch.equal(cache[:, :, :heads].float().nan_to_num(0.0), expected), "another position changed"
    assert all(same(cache, before) for cache, before in zip(caches(state)[2:], text, strict=True))
    assert torch.equal(buffers.qkv, qkv.view(rows, 3, dim)), "the query was written"


def text_attention_of(device: torch.device, dim: int, lengths: tuple[int, ...]) -> None:
    """Attention of slots to texts of these lengths. A row without a text gets exactly zero."""
    shape = Shape(dim, device)
    heads = shape.heads if device.type != "cpu" else 1
    slots, head = len(lengths), shape.head_dim
    state = state_of(shape, slots, heads, positions=1, text=max(TEXTS))
    for slot, length in enumerate(lengths):
        state.text_length[2 * slot] = length
        for seed, cache in enumerate(caches(state)[2:]):
            cache[0, slot, :heads, :length] = noise(heads, length, head, like=shape, seed=2 * slot + seed)
    before = [cache.clone() for cache in caches(state)]
    step, buffers = launcher(shape, slots + 1, state)
    step._slots = slots
    query = noise(slots, shape.heads, head, like=shape, dtype=shape.dtype, seed=99)
    buffers.qkv.view(-1)[: query.numel()] = query.flatten()
    both = query[:, :heads].float().repeat_interleave(2, dim=0)[:, :, None]  # [rows, heads, 1, head]
    exact = oracle(state, heads).cross_attend(0, both)[:, :, 0]
    assert not exact[1::2].any(), "the null row has no text"

    step.cross_attend(0)
    found = buffers.attended.view(-1, shape.heads, head)
    close(found[:slots, :heads], exact[::2])
    empty = state.text_length[::2] == 0
    assert not found[:slots, :heads][empty].any() and found[:slots, :heads][~empty].any(dim=-1).all()
    assert (found[:, heads:] == GARBAGE).all() and (found[slots:] == GARBAGE).all()
    assert all(same(*pair) for pair in zip(caches(state), before, strict=True)), "a cache was written"


# --- embedding ----------------------------------------------------------------------------------


def embedding_of(device: torch.device, slots: int, dim: int, codebooks: int, dtype: torch.dtype) -> None:
    """The residual stream has the bits that the decoder's own sum has."""
    positions = noise(CAPACITY, dim, like=Shape(dim, device))
    shape = Shape(dim, device, codebooks, card=30, position_embeddings=positions)
    embeddings = noise(codebooks * 31, dim, like=shape, dtype=dtype, seed=1)
    state = DeviceState(shape, Capacity(slots, columns=60, positions=CAPACITY, text=1))  # type: ignore[arg-type]
    state.columns.copy_((noise(slots, codebooks, 61, like=shape).abs() * 9).clamp(max=30).long())
    state.filled.copy_(1 + torch.arange(slots) % 60)
    state.prefix_length.copy_(torch.tensor([0, 235, CAPACITY - 3]).repeat(slots)[:slots])
    step, buffers = launcher(shape, slots + 1, state)
    step._slots = slots
    step.embed(embeddings)
    last = state.columns[torch.arange(slots, device=device), :, state.filled - 1]  # [slots, K]
    tables = embeddings.view(codebooks, 31, dim)
    expected = sum(F.embedding(last[:, k], tables[k]) for k in range(codebooks))
    assert isinstance(expected, Tensor)
    expected = (expected.float() + positions[state.position()]).repeat_interleave(2, dim=0)
    assert torch.equal(buffers.stream[: 2 * slots], expected)
    assert (buffers.stream[2 * slots :] == GARBAGE).all(), "the row of another slot was written"


# --- the draw -----------------------------------------------------------------------------------

PARAMETERS = [
    # guidance, temperature, top_k (250 is more than the smaller codebooks have), top_p
    (3.0, 1.0, 250, 0.0),
    (3.0, 0.0, 250, 0.0),
    (0.0, 0.7, 1, 0.0),
    (1.0, 1.3, 0, 0.9),
    (7.0, 1.0, 0, 0.0),
    (3.0, 1.0, 20, 0.3),
    (3.0, 1.0, 20, 1e-9),
    (3.0, 5.0, 2, 0.0),
]
SEEDS = (0, 1, 2**31, 2**32 - 1, 2**32, 0x123456789ABCDEF, 2**62 - 1, 77)


def draw_of(
    device: torch.device, slots: slice, delays: tuple[int, ...], card: int, dtype: torch.dtype
) -> None:
    """A slice of the slots gets exactly the tokens of the plain draw, and nothing else changes."""
    total = max(slots.stop, len(PARAMETERS))
    lm = language_model("melody", dim=32, layers=1, heads=1, card=card, delays=delays, dtype=dtype)
    decoder = Decoder(lm.to(device))
    chain, codebooks = Chain(decoder, total), len(delays)
    state = DeviceState(decoder, Capacity(total, columns=1503, positions=4, text=1))
    for slot in range(total):
        guidance, temperature, top_k, top_p = PARAMETERS[slot % len(PARAMETERS)]
        parameters = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, guidance=guidance)
        state.set_sampling(slot, parameters, SEEDS[slot % len(SEEDS)])
    state.filled.copy_(torch.tensor([0, 1, 2, 1502]).repeat(total)[:total])
    state.end.fill_(1503)
    state.end[3::5] = 0  # stopped
    state.end[6::7] = 2  # done, or not, as its first columns are filled
    state.columns.fill_(UNKNOWN)
    state.columns[::2, 0] = 5  # these tokens are given
    count = len(range(total)[slots])
    logits = 2 * noise(count, 2, codebooks, card, like=Shape(1024, device), seed=count)
    logits = logits.round().to(dtype)  # so that many are equal
    logits[:, :, -1] = logits[:, :, -1, :1]  # all are
    found, expected = (after_draw(step, state, logits.clone(), slots) for step in (chain, PlainStep(decoder)))
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    running = state.filled < state.end
    assert (found[0][running][:, -1] != UNKNOWN).any() or count < total
    assert torch.equal(found[1] != state.filled, running & in_slice(slots, running)), (
        "another slot was counted"
    )


def in_slice(slots: slice, like: Tensor) -> Tensor:
    inside = torch.zeros_like(like)
    inside[slots] = True
    return inside


def after_draw(step: Step, state: DeviceState, logits: Tensor, slots: slice) -> tuple[Tensor, Tensor]:
    """Draws, restores the state, and returns the columns without the scratch column, and the counts."""
    before = state.columns.clone(), state.filled.clone()
    step.draw(state, logits, slots)
    after = state.columns[:, :, :-1].clone(), state.filled.clone()
    state.columns.copy_(before[0])
    state.filled.copy_(before[1])
    return after


# --- which cases --------------------------------------------------------------------------------


def product_cases(*, every: bool) -> Iterator[Case]:
    """Each pair of a dim and a number of rows, with products and weights in rotation, or the full product."""
    turn = count()
    for dim, rows in cartesian(HEADS, ROWS):
        names = [name for name, kind in PRODUCTS.items() if rows <= 16 or kind.step == 1]
        if every:
            yield from cartesian((dim,), (rows,), names, WEIGHTS)
        else:
            for _ in range(2):
                at = next(turn)
                yield dim, rows, names[at % len(names)], WEIGHTS[at // 7 % 2]


def bfloat16_cases(*, every: bool) -> Iterator[Case]:
    yield from cartesian(HEADS, (1, 2, 8, 9, 16), PRODUCTS, ("bfloat16",))


def lengths_for(slots: int, choices: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Few lists of one length for each slot, in which all choices are."""
    lists = -(-len(choices) // slots)
    return [
        tuple(choices[(at * slots + slot) % len(choices)] for slot in range(slots)) for at in range(lists)
    ]


def attention_cases(*, every: bool) -> Iterator[Case]:
    """Each pair of a length and a number of slots, divided as the product divides them, or in all ways."""
    turn = cycle(HEADS)
    for slots in SLOTS:
        for lengths in lengths_for(slots, LENGTHS):
            for dim in HEADS if every else [next(turn)]:
                for parts in (1, 2, 4) if every else [attention_split(2 * slots, HEADS[dim], dim).parts]:
                    yield dim, lengths, parts


def text_cases(*, every: bool) -> Iterator[Case]:
    """Each pair of a length of a text and a number of slots."""
    turn = cycle(HEADS)
    for slots in SLOTS:
        for lengths in lengths_for(slots, TEXTS):
            for dim in HEADS if every else [next(turn)]:
                yield dim, lengths


def embedding_cases(*, every: bool) -> Iterator[Case]:
    models = list(cartesian(HEADS, (4, 8), (torch.float32, torch.float16)))
    for slots, model in (
        cartesian(SLOTS, models) if every else zip((1, 2, 3, 1, 16, 1), models[::2], strict=True)
    ):
        yield slots, *model


def draw_cases(*, every: bool) -> Iterator[Case]:
    slices = [slice(8), slice(16), *(slice(at, at + 1) for at in (range(8) if every else (1, 3, 6)))]
    models = [(STEREO, 70, torch.float16), ((0, 1, 2), 128, torch.float32)]
    large = [(MONO, 2048, torch.float16), (STEREO, 2048, torch.float16)]
    yield from ((slots, *model) for model, slots in cartesian(models, slices))
    yield from (
        ((slots, *model) for model, slots in cartesian(large, slices))
        if every
        else [(slice(1, 3), *large[0])]
    )


@dataclass(frozen=True)
class Check:
    """A property, and the cases for which it must hold."""

    holds: Callable[..., None]
    cases: Callable[..., Iterator[Case]]
    on_cpu: bool = True  # the interpreter does not compute bfloat16


def model_cases(*, every: bool) -> Iterator[Case]:
    yield from ((name,) for name in MODELS)


def once(*, every: bool) -> Iterator[Case]:
    yield ()


CHECKS = {
    "products": Check(product_of, product_cases),
    "products of bfloat16": Check(product_of, bfloat16_cases, on_cpu=False),
    "attention": Check(attention_of, attention_cases),
    "text attention": Check(text_attention_of, text_cases),
    "embeddings": Check(embedding_of, embedding_cases),
    "draws": Check(draw_of, draw_cases),
    "tokens": Check(chain_steps.tokens_of, model_cases),
    "bits": Check(chain_steps.bits_of, model_cases),
    "buckets": Check(chain_steps.buckets_of, model_cases),
    "null rows": Check(chain_steps.null_rows_of, once),
    "self-test": Check(chain_steps.the_self_test, once),
}  # fmt: skip


def failure_of(check: Check, device: torch.device, *, every: bool) -> tuple[int, str | None]:
    """Runs the cases of a check up to the first that fails: their number, and the failure."""
    cases = 0
    for case in check.cases(every=every):
        cases += 1
        try:
            with torch.inference_mode():
                check.holds(device, *case)
        except Exception:
            return cases, f"{case}:\n{traceback.format_exc()}"
    return cases, None


def main(arguments: list[str]) -> None:
    """Runs checks on a CPU, all by default, and prints a line for each."""
    every = "--all" in arguments
    for name in [each for each in arguments if each != "--all"] or CHECKS:
        began = time.process_time()
        cases, failure = failure_of(CHECKS[name], torch.device("cpu"), every=every)
        print(json.dumps([name, cases, round(time.process_time() - began, 1), failure]), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
