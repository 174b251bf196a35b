"""Whether tensors are what they say: as large in the file as in their shape, real and finite."""

from collections.abc import Iterable, Mapping

import torch

from musicgen_svc.checkpoints.base import some
from musicgen_svc.errors import WeightsError

_SHARED = 2
"""How often the same bytes may be used: one tensor may have two names, as T5's embedding does."""
_SLACK_BYTES = 1 << 20


def check_stored(state: Mapping[str, torch.Tensor], origin: str) -> None:
    """Whether a state dict's tensors are all there, so that using them takes the memory that the file takes.

    A tensor with a stride of 0 is as large as its shape says once it is copied, and a few bytes in its file.

    Raises:
        WeightsError: a tensor is larger than what is stored of it, many tensors share the same bytes, or
            one is not stored as a plain array of real numbers.
    """
    spans, total = [], 0
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested or tensor.is_meta:
            raise WeightsError(f"{origin} holds {name:.80}, which is not stored as a plain array of numbers.")
        if tensor.is_complex():
            raise WeightsError(f"{origin} holds complex numbers in {name:.80}; weights must be real.")
        storage = tensor.untyped_storage()
        if tensor.nbytes > storage.nbytes():
            raise WeightsError(
                f"{origin} holds {name:.80} of {tensor.nbytes} bytes, of which {storage.nbytes()} are stored."
            )
        spans.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
        total += tensor.nbytes
    stored = _covered(spans)
    if total > _SHARED * stored + _SLACK_BYTES:
        raise WeightsError(
            f"{origin} holds tensors of {total} bytes that share {stored} bytes: save them with a copy each."
        )


def _covered(spans: list[tuple[int, int]]) -> int:
    """How many bytes lie in at least one of the spans."""
    covered = end = 0
    for start, stop in sorted(spans):
        covered += max(0, stop - max(start, end))
        end = max(end, stop)
    return covered


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]], origin: str) -> None:
    """Whether every number is finite, in the type that it is used in.

    One pass over each tensor, without a copy of it; on a GPU there is one wait for all of them.

    Raises:
        WeightsError: NaN or infinite numbers are among them; the message names the first few tensors.
    """
    names, extremes = [], []
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.numel() and not tensor.is_meta:
            names.append(name)
            # Of both NaN and infinity one of the two tells; `isfinite` would take a hundred times as long.
            extremes.append(torch.stack(torch.aminmax(tensor.detach())).double())
    if not names:
        return
    finite = torch.isfinite(torch.stack(extremes)).all(1).tolist()
    if not all(finite):
        wrong = [name for name, sound in zip(names, finite, strict=True) if not sound]
        raise WeightsError(f"{origin} holds numbers that are not finite (NaN or infinity) in {some(wrong)}.")
