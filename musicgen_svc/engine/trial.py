"""Whether a GPU replays a model's step as it launches it: tried out while the model is loaded.

A recording that fails leaves PyTorch's allocator and random stream as they are within one, for the rest
of the process. What would make it fail, a step that waits for the device, is therefore looked for first,
where it does no harm.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from musicgen_svc.engine.batch import Batch, DecodeRequest
from musicgen_svc.engine.graphs import Graphed
from musicgen_svc.errors import GenerationError, first_line
from musicgen_svc.request import SamplingParams

FRAMES = 12


def keep_graphs_that_work(batch: Batch, graphed: Graphed[Any]) -> None:
    """Leaves recording on if what is replayed draws the tokens that are drawn without.

    graphed: what records the steps of `batch`, in which nobody else is

    Raises:
        GenerationError: a step could not be recorded.
    """
    if not graphed.enabled:
        return
    graphed.enabled = False
    try:
        launched = _decoded(batch, _waiting_is_an_error())
    except RuntimeError as exc:
        _warn(f"a step cannot be recorded: {first_line(exc)}")
        return
    graphed.enabled = True
    try:
        replayed = _decoded(batch, nullcontext())
    except Exception as exc:  # CUDA's, a library's or the allocator's
        raise GenerationError(
            f"This GPU cannot record the decoding step ({first_line(exc)}): set MUSICGEN_CUDA_GRAPHS=false."
        ) from exc
    if not torch.equal(replayed, launched):
        _warn("a recorded step draws other tokens")
        graphed.forget()
        graphed.enabled = False


def _decoded(batch: Batch, stepping: AbstractContextManager[None]) -> Tensor:
    """[K, FRAMES] tokens of a request that asks for nothing in particular."""
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
def _waiting_is_an_error() -> Iterator[None]:
    """PyTorch's own check, which belongs to the process: while somebody else waits, they fail of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls itself a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _warn(reason: str) -> None:
    logging.getLogger(__name__).warning("Decoding without CUDA graphs: %s", reason)
