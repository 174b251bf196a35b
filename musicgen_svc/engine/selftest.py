"""Tests when a model is loaded whether CUDA graphs and kernels work correctly on this machine.

A recording that fails leaves PyTorch's allocator and random stream in the state of a recording for the rest
of the process. A step that waits for the device would make a recording fail, so a launched step is tested
for waits before any step is recorded.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from musicgen_svc.engine.batch import Batch, DecodeRequest
from musicgen_svc.engine.graphs import Graphed
from musicgen_svc.engine.operations import PLAIN, Operations
from musicgen_svc.engine.sampling import SlotParameters
from musicgen_svc.engine.sampling_params import SamplingParams
from musicgen_svc.engine.state import Capacity
from musicgen_svc.errors import GenerationError, first_line

FRAMES = 12
"""How many frames the self-test of graphs decodes."""


# Graphs


def keep_graphs_that_work(batch: Batch, graphed: Graphed[Any]) -> None:
    """Disables graphs unless a replayed step draws the tokens that a launched step draws.

    Args:
        batch: an empty batch.
        graphed: the step of the batch.

    Raises:
        GenerationError: a step could not be recorded.
    """
    if not graphed.enabled:
        return
    graphed.enabled = False
    try:
        launched = _decode(batch, _syncs_raise())
    except RuntimeError as exc:
        _warn(f"a step cannot be recorded: {first_line(exc)}")
        return
    graphed.enabled = True
    try:
        replayed = _decode(batch, nullcontext())
    except Exception as exc:  # from CUDA, a library or PyTorch's allocator
        raise GenerationError(
            f"This GPU cannot record the decoding step ({first_line(exc)}): set MUSICGEN_CUDA_GRAPHS=off."
        ) from exc
    if not torch.equal(replayed, launched):
        _warn("a recorded step draws other tokens")
        graphed.forget()
        graphed.enabled = False


def _decode(batch: Batch, stepping: AbstractContextManager[None]) -> Tensor:
    """Decodes a request without conditions, within `stepping`: -> [K, FRAMES] tokens on the CPU."""
    codebooks, device = batch.decoder.codebooks, batch.decoder.device
    prompt = torch.zeros(codebooks, 1, dtype=torch.long, device=device)
    request = DecodeRequest({}, prompt, FRAMES, SamplingParams(), torch.Generator().manual_seed(0))
    slot = batch.open(request)
    try:
        with stepping:
            while not slot.done:
                batch.step()
        return slot.codes.cpu()
    finally:
        batch.close(slot)


@contextmanager
def _syncs_raise() -> Iterator[None]:
    """Makes PyTorch raise an error if the host waits for the device.

    This is process-wide: while it is active, a wait in another thread raises too.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns that this check is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _warn(reason: str) -> None:
    """Logs why graphs are disabled."""
    logging.getLogger(__name__).warning("Decoding without CUDA graphs: %s", reason)


# Kernels


@dataclass(frozen=True)
class Shape:
    """The numbers of a model on which the kernels depend."""

    dim: int
    heads: int
    codebooks: int
    card: int
    dtype: torch.dtype  # of the layers


@torch.inference_mode()
def disagreements(ops: Operations, shape: Shape, device: torch.device) -> list[str]:
    """Compares operations with the plain ones on random numbers.

    Args:
        ops: the operations to test.
        shape: the model's.
        device: where to compute.

    Returns:
        list[str]: what differs, in words.
    """
    source = torch.Generator().manual_seed(0)

    def noise(*size: int) -> Tensor:
        return torch.randn(size, generator=source).to(device)

    differences = []
    x, delta, weight, bias = noise(2, 1, shape.dim), noise(2, 1, shape.dim), *noise(2, shape.dim)
    normed = [o.add_norm(x, delta.to(shape.dtype), weight, bias, 1e-5, shape.dtype) for o in (ops, PLAIN)]
    if not _close(*normed):
        differences.append("the LayerNorm differs")

    capacity = Capacity(1)
    head = shape.dim // shape.heads
    query, key, value = (noise(2, shape.heads, 1, head).to(shape.dtype) for _ in range(3))
    cache = noise(2, 2, shape.heads, capacity.positions, head).to(shape.dtype)
    lengths, text_lengths = torch.tensor([300, 65], device=device), torch.tensor([40, 0], device=device)
    attended = []
    for o in (ops, PLAIN):
        keys, values = cache.clone()
        text = o.attention(text_lengths, capacity.text)(query, keys[:1], values[:1])
        own = o.attention(lengths, capacity.positions)(query, keys, values, (key, value))
        attended.append((text, own, keys, values))
    if not _close(*attended):
        differences.append("the attention differs")

    logits = (3 * noise(4, 2, shape.codebooks, shape.card)).to(shape.dtype)
    parameters = SlotParameters(
        *(
            torch.tensor(per_slot, device=device)
            for per_slot in (
                [3.0, 3, 1, 0], [0.0, 1, 0.7, 1.3], [250, 250, 0, 1],
                [0.0, 0, 0.9, 0], [1, 2, 3, 2**40], [9] * 4,
            )
        )
    )  # fmt: skip
    other = ops.draw(logits, parameters) != PLAIN.draw(logits, parameters)
    if other.float().mean() > 0.1:  # a rounding error may change one of them
        differences.append("other tokens are drawn")

    x, scales = noise(2, 1, shape.dim).to(shape.dtype), noise(shape.dim).abs() / 127 / shape.dim**0.5
    weight = (127 * noise(shape.dim, shape.dim)).clamp(-127, 127).to(torch.int8)
    if not _close(*([o.int8_linear(x, weight, scales)] for o in (ops, PLAIN))):
        differences.append("the product with int8 differs")
    return differences


def _close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether tensors are equal up to rounding in fp16."""
    return all(torch.allclose(a.float(), b.float(), atol=0.02) for a, b in zip(found, expected, strict=True))
