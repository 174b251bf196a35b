"""Tests when a model is loaded whether CUDA graphs and kernels work correctly on this machine.

A recording that fails leaves PyTorch's allocator and random stream in the state of a recording for the rest
of the process. A step that waits for the device would make a recording fail, so a launched step is tested
for waits before any step is recorded.
"""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from musicgen_svc.engine.batch import UNKNOWN, Batch, DecodeRequest
from musicgen_svc.engine.decoder import Decoder
from musicgen_svc.engine.graphs import Graphed
from musicgen_svc.engine.sampling_params import SamplingParams
from musicgen_svc.engine.state import ActiveExtent, Capacity, DeviceState, Step
from musicgen_svc.errors import GenerationError, first_line

FRAMES = 12
"""How many frames the self-test of graphs decodes."""
LENGTH, TEXT, COLUMNS = 301, 80, 4
"""Positions, text tokens and columns of the slot with which kernels are tested."""
SEED = 2**40 + 9
"""The seed of the draws with which kernels are tested, both of whose 32-bit words count."""
UNWRITTEN = 100.0
"""What the cache holds at the position of the new key and value, until a step stores them."""
SAMPLED = (
    SamplingParams(), SamplingParams(temperature=0), SamplingParams(top_p=0.9), SamplingParams(top_k=0)
)  # fmt: skip
"""How the tokens are drawn with which kernels are tested."""
TOLERANCE = 0.01
"""By how much the logits of kernels may differ, relative to their norm. In fp16 it was 0.001 on an H200."""


# Graphs


def keep_graphs_that_work(batch: Batch, graphed: Graphed[Any]) -> str | None:
    """Disables graphs unless a replayed step draws the tokens that a launched step draws.

    Args:
        batch: an empty batch.
        graphed: the step of the batch.

    Returns:
        str: why graphs are disabled, or None.

    Raises:
        GenerationError: a step could not be recorded.
    """
    graphed.enabled = False
    try:
        launched = _decode(batch, _syncs_raise())
    except RuntimeError as exc:
        return f"a step cannot be recorded: {first_line(exc)}"
    graphed.enabled = True
    try:
        replayed = _decode(batch, nullcontext())
    except Exception as exc:  # from CUDA, a library or PyTorch's allocator
        raise GenerationError(
            f"This GPU cannot record the decoding step ({first_line(exc)}): set MUSICGEN_CUDA_GRAPHS=off."
        ) from exc
    if not torch.equal(replayed, launched):
        graphed.forget()
        graphed.enabled = False
        return "a recorded step draws other tokens"
    return None


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


# Kernels


@torch.inference_mode()
def disagreements(step: Step, plain: Step, decoder: Decoder) -> list[str]:
    """Compares the steps of one slot with those in plain PyTorch, on a cache of random numbers.

    This also compiles the kernels of one slot, so that the first request need not.

    Returns:
        list[str]: what differs, in words.
    """
    state = DeviceState(decoder, Capacity(1, columns=COLUMNS, positions=LENGTH + COLUMNS, text=TEXT))
    source = torch.Generator().manual_seed(0)
    for buffer in (state.keys, state.values, state.text_keys, state.text_values):
        if buffer is not None:
            buffer.copy_(torch.randn(buffer.shape, generator=source))
    state.columns.copy_(torch.randint(decoder.card, state.columns.shape, generator=source))
    state.filled.fill_(COLUMNS - 1)
    state.prefix_length.fill_(LENGTH - (COLUMNS - 1))
    state.end.fill_(COLUMNS)
    state.text_length[0] = TEXT - 7 if decoder.has_text else 0
    extent = ActiveExtent(1, LENGTH + COLUMNS, TEXT)
    expected, found = (_logits(each, state, extent) for each in (plain, step))
    differences = []
    for what, one, other in zip(("logits", "keys", "values"), expected, found, strict=True):
        error = (other.float() - one.float()).norm() / one.float().norm()
        if not error < TOLERANCE:  # also if it is NaN
            differences.append(f"the {what} of the kernels differ by {float(error):.2g}")

    logits = (2 * torch.randn(expected[0].shape, generator=source)).to(expected[0])
    tokens, drawn = (_draws(each, state, logits) for each in (plain, step))
    if (drawn != tokens).sum() > len(tokens) // 10 + 1:  # a rounding error may change one of them
        differences.append("the kernels draw other tokens")
    return differences


def _logits(step: Step, state: DeviceState, extent: ActiveExtent) -> tuple[Tensor, ...]:
    """Computes the logits of the only slot, and returns them with the new keys and the new values."""
    newest = [cache[:, :, :, LENGTH - 1] for cache in (state.keys, state.values)]
    for cells in newest:
        cells.fill_(UNWRITTEN)
    logits = step.logits(state, extent).clone()
    return logits, *(cells.clone() for cells in newest)


def _draws(step: Step, state: DeviceState, logits: Tensor) -> Tensor:
    """Draws the first column of the only slot in several ways: tokens, and how many columns are filled."""
    drawn = []
    for sampling in SAMPLED:
        state.columns.fill_(UNKNOWN)
        state.filled.fill_(0)
        state.set_sampling(0, sampling, SEED)
        step.draw(state, logits, slice(1))
        drawn += [state.columns[0, :, 0].clone(), state.filled.clone()]
    return torch.cat(drawn)
