"""The one place that chooses how a model is decoded, by its device and by what was asked for."""

import logging
from contextlib import nullcontext
from typing import Literal

import torch

from musicgen_svc.audiocraft_compat import LMModel
from musicgen_svc.engine.batch import Batch
from musicgen_svc.engine.decoder import Decoder, Lend
from musicgen_svc.engine.operations import PLAIN, Operations
from musicgen_svc.engine.projections import Precision
from musicgen_svc.engine.ragged import RaggedBatch
from musicgen_svc.engine.selftest import Shape, disagreements, keep_graphs_that_work
from musicgen_svc.engine.state import Capacity
from musicgen_svc.engine.static import StaticBatch

Switch = Literal["auto", "on", "off"]
"""`auto`: where it works, which a self-test at load says. `on`: or fail."""
BatchKind = Literal["auto", "static", "ragged"]
"""`auto`: static on a GPU, ragged on a CPU."""


def batch_for(
    lm: LMModel,
    *,
    slots: int = 1,
    precision: Precision = "reference",
    kind: BatchKind = "auto",
    graphs: Switch = "auto",
    kernels: Switch = "auto",
    lend: Lend = nullcontext,
) -> Batch:
    """A batch that decodes with the weights of one language model.

    Args:
        lm: the model, in evaluation mode.
        slots: how many requests are decoded at once.
        precision: see `projections.py`.
        kind: where the slots' state lies. A ragged batch on a GPU runs greedy requests only.
        graphs: whether a GPU records the step and replays it. Otherwise the same step is launched operation
            by operation.
        kernels: whether a static batch decodes with Triton kernels.
        lend: gives the model its weights, see `Decoder`.

    Raises:
        WeightsError: the model is built in a way that no released MusicGen is.
        ImportError: kernels are on, and there is no Triton.
        GenerationError: graphs are not off, and this GPU cannot record them.
    """
    assert slots >= 1 and not lm.training, (slots, lm.training)
    on_gpu = lm.emb[0].weight.device.type == "cuda"
    if on_gpu:
        # On Hopper and Blackwell PyTorch 2.11 prefers cuDNN's attention, which makes a plan for each shape in
        # each thread, in tens of milliseconds: for every length of a prefill, for every step of a cache that
        # grows.
        torch.backends.cuda.enable_cudnn_sdp(False)
    static = kind == "static" or (kind == "auto" and on_gpu)
    decoder = Decoder(lm, precision, operations_for(lm, kernels if static else "off"), lend)
    if not static:
        return RaggedBatch(decoder, slots)
    batch = StaticBatch(decoder, Capacity(slots), graphs=graphs != "off")
    if graphs == "auto":
        keep_graphs_that_work(batch, batch.graphed)
    return batch


def operations_for(lm: LMModel, kernels: Switch = "auto") -> Operations:
    """The operations that a model is decoded with.

    Raises:
        ImportError: kernels are on, and there is no Triton.
    """
    device = lm.emb[0].weight.device
    if kernels == "off" or (kernels == "auto" and device.type != "cuda"):
        return PLAIN
    if kernels == "on":
        return _kernels()
    layer = lm.transformer.layers[0]
    shape = Shape(lm.dim, layer.self_attn.num_heads, lm.n_q, lm.card, layer.linear1.weight.dtype)
    return kernels_that_work(shape, device)


def kernels_that_work(shape: Shape, device: torch.device) -> Operations:
    """The kernels where they can be built and agree with the plain operations, else the plain ones.

    Triton needs a GPU that it knows and a C compiler; whether it has both shows at its first launch. Most of
    what one request needs is compiled here, for this model's shape, and not in that request.
    """
    try:
        found = _kernels()
        wrong = disagreements(found, shape, device)
    except Exception as exc:  # a compiler's and a driver's errors have no common class
        wrong = [f"{type(exc).__name__}: {exc}"]
    if not wrong:
        return found
    logging.getLogger(__name__).warning("Decoding without GPU kernels: %s", "; ".join(wrong))
    return PLAIN


def _kernels() -> Operations:
    from musicgen_svc.engine.kernels import KERNELS

    return KERNELS
