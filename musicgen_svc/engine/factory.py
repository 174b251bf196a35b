"""Chooses the batch and the steps that decode a model, by its device and the settings."""

import logging
from contextlib import nullcontext
from typing import Literal

import torch

from musicgen_svc.audiocraft_compat import LMModel
from musicgen_svc.engine.batch import Batch
from musicgen_svc.engine.decoder import Decoder, WeightsLoader
from musicgen_svc.engine.plain_step import PlainStep
from musicgen_svc.engine.projections import Precision
from musicgen_svc.engine.ragged import RaggedBatch
from musicgen_svc.engine.selftest import disagreements, keep_graphs_that_work
from musicgen_svc.engine.state import Capacity, Step
from musicgen_svc.engine.static import StaticBatch
from musicgen_svc.errors import GenerationError, first_line

Switch = Literal["auto", "on", "off"]
"""`auto`: on if a self-test at load shows that it works. `on`: on, or loading fails. `off`: off."""
BatchKind = Literal["auto", "static", "ragged"]
"""`auto`: static on a GPU, ragged on a CPU."""


def batch_for(
    lm: LMModel,
    *,
    slots: int = 1,
    precision: Precision = "reference",
    batch_kind: BatchKind = "auto",
    graphs: Switch = "auto",
    kernels: Switch = "auto",
    load_weights: WeightsLoader = nullcontext,
) -> Batch:
    """Makes the batch that decodes with the weights of one language model.

    Args:
        lm: the model, in evaluation mode.
        slots: how many requests are decoded at once.
        precision: how matrices are stored and multiplied, see `projections.py`.
        batch_kind: which implementation of `Batch`. A ragged batch on a GPU decodes greedy requests only.
        graphs: whether a step on a GPU is recorded as a CUDA graph and replayed. If not, its operations are
            launched one by one.
        kernels: whether a static batch decodes with the kernels of `chain`. A ragged batch never does.
        load_weights: loads the weights of a layer or of the output heads, see `Decoder`.

    Raises:
        WeightsError: the model is built in a way that no released MusicGen is.
        GenerationError: `kernels` is on, and there are none for this model, or `graphs` is not off, and this
            GPU cannot record a step.
    """
    assert slots >= 1 and not lm.training, (slots, lm.training)
    on_gpu = lm.emb[0].weight.device.type == "cuda"
    if on_gpu:
        # On Hopper and Blackwell, PyTorch 2.11 prefers cuDNN's attention, which takes tens of milliseconds to
        # plan each new shape in each thread. Every length of a prefill and every step of a growing cache is a
        # new shape.
        torch.backends.cuda.enable_cudnn_sdp(False)
    static = batch_kind == "static" or (batch_kind == "auto" and on_gpu)
    decoder = Decoder(lm, precision, load_weights)
    if not static:
        return RaggedBatch(decoder, slots)
    step, without_kernels = step_for(decoder, slots, kernels)
    batch = StaticBatch(decoder, step, Capacity(slots), graphs=graphs != "off")
    without_graphs = "they are off" if graphs == "off" else None
    if graphs == "auto" and on_gpu:
        without_graphs = keep_graphs_that_work(batch, batch.graphed)
    if on_gpu:
        _log_path(without_kernels, without_graphs)
    return batch


def _log_path(without_kernels: str | None, without_graphs: str | None) -> None:
    """Logs in one line how a model is decoded on a GPU: as a warning with the reasons if it is a slow way."""
    ways = {"kernels": without_kernels, "CUDA graphs": without_graphs}
    slow = [f"without {way}, because {reason}" for way, reason in ways.items() if reason is not None]
    fast = [f"with {way}" for way, reason in ways.items() if reason is None]
    level = logging.WARNING if slow else logging.INFO
    logging.getLogger(__name__).log(level, "Decoding on the GPU %s.", "; ".join(fast + slow))


def step_for(decoder: Decoder, slots: int, kernels: Switch = "auto") -> tuple[Step, str | None]:
    """Chooses how the steps of a static batch are computed.

    Triton needs a GPU that it supports and a C compiler, and fails at its first launch without them.

    Returns:
        tuple: the steps, and why they are not those of the kernels; None if they are.

    Raises:
        GenerationError: `kernels` is on, and there are none for this model.
    """
    plain = PlainStep(decoder)
    if kernels == "off":
        return plain, "they are off"
    if kernels == "auto" and decoder.device.type != "cuda":
        return plain, "there is no GPU"
    try:
        chain = _kernels(decoder, slots)
        differences = disagreements(chain, plain, decoder)
    except Exception as exc:  # the errors of a compiler and a driver have no common class
        differences = [f"{type(exc).__name__}: {first_line(exc).rstrip('.')}"]
    if not differences:
        return chain, None
    if kernels == "on":
        raise GenerationError(f"Kernels are on, but cannot be used: {'; '.join(differences)}.")
    return plain, "; ".join(differences)


def _kernels(decoder: Decoder, slots: int) -> Step:
    """Makes the steps of the kernels, whose modules import Triton."""
    from musicgen_svc.engine.chain.chain import Chain

    return Chain(decoder, slots)
