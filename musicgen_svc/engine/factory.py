"""Chooses the batch and the operations that decode a model, by its device and the settings."""

import logging
from contextlib import nullcontext
from typing import Literal

import torch

from musicgen_svc.audiocraft_compat import LMModel
from musicgen_svc.engine.batch import Batch
from musicgen_svc.engine.decoder import Decoder, WeightsLoader
from musicgen_svc.engine.operations import PLAIN, Operations
from musicgen_svc.engine.projections import Precision
from musicgen_svc.engine.ragged import RaggedBatch
from musicgen_svc.engine.selftest import Shape, disagreements, keep_graphs_that_work
from musicgen_svc.engine.state import Capacity
from musicgen_svc.engine.static import StaticBatch

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
        kernels: whether a static batch decodes with Triton kernels.
        load_weights: loads the weights of a layer or of the output heads, see `Decoder`.

    Raises:
        WeightsError: the model is built in a way that no released MusicGen is.
        ImportError: `kernels` is on, and Triton is not installed.
        GenerationError: `graphs` is not off, and this GPU cannot record a step.
    """
    assert slots >= 1 and not lm.training, (slots, lm.training)
    on_gpu = lm.emb[0].weight.device.type == "cuda"
    if on_gpu:
        # On Hopper and Blackwell, PyTorch 2.11 prefers cuDNN's attention, which takes tens of milliseconds to
        # plan each new shape in each thread. Every length of a prefill and every step of a growing cache is a
        # new shape.
        torch.backends.cuda.enable_cudnn_sdp(False)
    static = batch_kind == "static" or (batch_kind == "auto" and on_gpu)
    decoder = Decoder(lm, precision, operations_for(lm, kernels if static else "off"), load_weights)
    if not static:
        return RaggedBatch(decoder, slots)
    batch = StaticBatch(decoder, Capacity(slots), graphs=graphs != "off")
    if graphs == "auto":
        keep_graphs_that_work(batch, batch.graphed)
    return batch


def operations_for(lm: LMModel, kernels: Switch = "auto") -> Operations:
    """Chooses the operations that a model is decoded with.

    Raises:
        ImportError: `kernels` is on, and Triton is not installed.
    """
    device = lm.emb[0].weight.device
    if kernels == "off" or (kernels == "auto" and device.type != "cuda"):
        return PLAIN
    if kernels == "on":
        return load_kernels()
    layer = lm.transformer.layers[0]
    shape = Shape(lm.dim, layer.self_attn.num_heads, lm.n_q, lm.card, layer.linear1.weight.dtype)
    return kernels_that_work(shape, device)


def kernels_that_work(shape: Shape, device: torch.device) -> Operations:
    """Returns the kernels if they can be built and agree with the plain operations, else the plain ones.

    Triton needs a GPU that it supports and a C compiler, and fails at its first launch without them. This
    test also compiles most of the kernels for the model's shape, so that the first request need not.
    """
    try:
        kernels = load_kernels()
        failures = disagreements(kernels, shape, device)
    except Exception as exc:  # the errors of a compiler and a driver have no common class
        failures = [f"{type(exc).__name__}: {exc}"]
    if not failures:
        return kernels
    logging.getLogger(__name__).warning("Decoding without GPU kernels: %s", "; ".join(failures))
    return PLAIN


def load_kernels() -> Operations:
    """Imports the kernels, which import Triton."""
    from musicgen_svc.engine.kernels import KERNELS

    return KERNELS
