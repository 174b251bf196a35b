"""Which operations an engine decodes with: the GPU kernels where they work, else plain PyTorch."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from musicgen_svc.compat import LMModel
from musicgen_svc.engine.operations import PLAIN, Operations
from musicgen_svc.engine.state import Capacity


@dataclass(frozen=True)
class Shape:
    """Of the model that is to be decoded."""

    dim: int
    heads: int
    codebooks: int
    card: int
    dtype: torch.dtype  # of the layers


def operations_for(lm: LMModel, kernels: bool | None = None) -> Operations:
    """kernels: False: none; None: on a GPU, where they work; True: none but them.

    Raises:
        ImportError: they were asked for, and there is no Triton.
    """
    device = lm.emb[0].weight.device
    if kernels is False or (kernels is None and device.type != "cuda"):
        return PLAIN
    if kernels:
        return _kernels()
    layer = lm.transformer.layers[0]
    return best(Shape(lm.dim, layer.self_attn.num_heads, lm.n_q, lm.card, layer.linear1.weight.dtype), device)


def best(shape: Shape, device: torch.device) -> Operations:
    """The kernels where they can be built and agree with the plain operations, else those.

    Triton needs a GPU that it knows and a C compiler; what it finds is seen at its first launch. Most
    of what one request needs is built here, for this model's shape, rather than in that request.
    """
    try:
        found = _kernels()
        wrong = disagreements(found, shape, device)
    except Exception as exc:  # a compiler's and a driver's errors have no common class
        wrong = [f"{type(exc).__name__}: {exc}"]
    if not wrong:
        return found
    logging.getLogger(__name__).warning("Decoding without GPU kernels of our own: %s", "; ".join(wrong))
    return PLAIN


def _kernels() -> Operations:
    from musicgen_svc.engine.kernels import KERNELS

    return KERNELS


@torch.inference_mode()
def disagreements(ops: Operations, shape: Shape, device: torch.device) -> list[str]:
    """What operations compute otherwise than the plain ones, on a few numbers of a model's shape."""
    source = torch.Generator().manual_seed(0)

    def noise(*size: int) -> Tensor:
        return torch.randn(size, generator=source).to(device)

    found = []
    x, delta, weight, bias = noise(2, 1, shape.dim), noise(2, 1, shape.dim), *noise(2, shape.dim)
    normed = [o.add_norm(x, delta.to(shape.dtype), weight, bias, 1e-5, shape.dtype) for o in (ops, PLAIN)]
    if not _close(*normed):
        found.append("the LayerNorm is another")

    capacity = Capacity(1)
    head = shape.dim // shape.heads
    query, key, value = (noise(2, shape.heads, 1, head).to(shape.dtype) for _ in range(3))
    cache = noise(2, 2, shape.heads, capacity.positions, head).to(shape.dtype)
    lengths, heard = torch.tensor([300, 65], device=device), torch.tensor([40, 0], device=device)
    attended = []
    for o in (ops, PLAIN):
        keys, values = cache.clone()
        text = o.attention(heard, capacity.text)(query, keys[:1], values[:1])
        own = o.attention(lengths, capacity.positions)(query, keys, values, (key, value))
        attended.append((text, own, keys, values))
    if not _close(*attended):
        found.append("the attention is another")

    logits = (3 * noise(4, 2, shape.codebooks, shape.card)).to(shape.dtype)
    parameters = (
        torch.tensor(per_slot, device=device)
        for per_slot in (
            [3.0, 3, 1, 0], [0.0, 1, 0.7, 1.3], [250, 250, 0, 1], [0.0, 0, 0.9, 0], [1, 2, 3, 2**40], [9] * 4
        )
    )  # fmt: skip
    given = (logits, *parameters)
    other = ops.draw(*given) != PLAIN.draw(*given)
    if other.float().mean() > 0.1:  # one may be a matter of the last bit
        found.append("other tokens are drawn")

    x, scales = noise(2, 1, shape.dim).to(shape.dtype), noise(shape.dim).abs() / 127 / shape.dim**0.5
    weight = (127 * noise(shape.dim, shape.dim)).clamp(-127, 127).to(torch.int8)
    if not _close(*([o.int8_linear(x, weight, scales)] for o in (ops, PLAIN))):
        found.append("the product with int8 is another")
    return found


def _close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Up to the rounding of fp16."""
    return all(torch.allclose(a.float(), b.float(), atol=0.02) for a, b in zip(found, expected, strict=True))
