"""Checks a state dict against the file that stores it, its configuration and its module, and its values.

In the order in which a loader calls them: `check_stored` when the file is opened, `check_*_sizes` before any
module is built, `check_fit` when the module exists without weights, `check_finite` when it has its weights.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from musicgen_svc.errors import WeightsError

_Tensors = Mapping[str, torch.Tensor]

_MAX_SHARING = 2
"""How often the same bytes may be used: one tensor may have two names, as T5's embedding has."""
_SLACK_BYTES = 1 << 20


def check_stored(state: _Tensors, origin: str) -> None:
    """Checks that a state dict's tensors are complete in their file, so that they take the file's memory.

    A tensor with a stride of 0 takes a few bytes in its file, and all that its shape says once it is copied.

    Args:
        origin: the checkpoint's format and path, for messages.

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
    stored = _union_bytes(spans)
    if total > _MAX_SHARING * stored + _SLACK_BYTES:
        raise WeightsError(
            f"{origin} holds tensors of {total} bytes that share {stored} bytes: save them with a copy each."
        )


def _union_bytes(spans: list[tuple[int, int]]) -> int:
    """How many bytes lie in at least one of the spans (start, end)."""
    union = last_end = 0
    for start, end in sorted(spans):
        union += max(0, end - max(start, last_end))
        last_end = max(last_end, end)
    return union


# --- sizes: compared before a module is built, because building millions of layers would never end ---


def check_lm_sizes(lm: Mapping[str, Any], state: _Tensors, origin: str) -> None:
    """Compares `transformer_lm` with a language model's tensors under audiocraft's names.

    Raises:
        WeightsError: the tensors have another number of layers or codebooks, or another width.
    """
    sizes = {
        "num_layers": _count(state, r"transformer\.layers\.(\d+)\."),
        "n_q": _count(state, r"emb\.(\d+)\.weight$"),
        "dim": _size(state, "emb.0.weight", 1),
        "card": _size(state, "emb.0.weight", 0, less=1),  # the last entry is the special token
    }
    _compare(lm, sizes, "language model", origin)


def check_codec_sizes(rvq: Mapping[str, Any], state: _Tensors, origin: str) -> None:
    """Compares `rvq` with a codec's tensors under audiocraft's names.

    Raises:
        WeightsError: the tensors have another number of codebooks, or of entries in a codebook.
    """
    codebook = "quantizer.vq.layers.0._codebook.embed"
    sizes = {"n_q": _count(state, r"quantizer\.vq\.layers\.(\d+)\."), "bins": _size(state, codebook, 0)}
    _compare(rvq, sizes, "codec", origin)


def check_t5_sizes(config: Mapping[str, Any], state: _Tensors, origin: str) -> None:
    """Compares T5's configuration with the tensors of its encoder.

    Raises:
        WeightsError: the tensors have another number of layers, another width or another vocabulary.
    """
    sizes = {
        "num_layers": _count(state, r"encoder\.block\.(\d+)\."),
        "vocab_size": _size(state, "shared.weight", 0),
        "d_model": _size(state, "shared.weight", 1),
    }
    _compare(config, sizes, "T5 encoder", origin)


def _compare(config: Mapping[str, Any], sizes: Mapping[str, int | None], module: str, origin: str) -> None:
    """Compares fields with the tensors' sizes; a size that either side lacks is not compared."""
    for name, size in sizes.items():
        if size is not None and config.get(name, size) != size:
            raise WeightsError(
                f"{origin} does not fit its configuration as a {module}: {name} is {config[name]} there, "
                f"and the tensors have {size}."
            )


def _count(state: _Tensors, pattern: str) -> int | None:
    """How many different numbers the names have in the pattern's group; None for none."""
    return len({match[1] for name in state if (match := re.match(pattern, name))}) or None


def _size(state: _Tensors, name: str, dimension: int, less: int = 0) -> int | None:
    """One dimension of a matrix, minus `less`; None if there is no such matrix."""
    tensor = state.get(name)
    return None if tensor is None or tensor.ndim != 2 else tensor.shape[dimension] - less


# --- names, shapes and values ----------------------------------------------------------------------


def check_fit(expected: _Tensors, state: _Tensors, module: str, origin: str) -> None:
    """Compares the names and shapes that a module expects with those of a checkpoint.

    Args:
        expected: the module's own state dict.
        module: what the message calls the module: `language model`.
        origin: the checkpoint's format and path.

    Raises:
        WeightsError: names are missing or unexpected, shapes differ, or there are complex numbers or integers
            where floating-point numbers belong; the message names the first few.
    """
    faults = []
    if missing := expected.keys() - state.keys():
        faults.append(f"it lacks {summarize_tensors(sorted(missing))}")
    if unexpected := state.keys() - expected.keys():
        faults.append(f"it has {summarize_tensors(sorted(unexpected))} too many")
    shapes = [
        f"{name} is {list(state[name].shape)} where {list(expected[name].shape)} belongs"
        for name in sorted(expected.keys() & state.keys())
        if expected[name].shape != state[name].shape
    ]
    if shapes:
        faults.append(f"it has {summarize_tensors(shapes)} of another shape")
    types = [
        f"{name} is {str(state[name].dtype).removeprefix('torch.')}"
        for name in sorted(expected.keys() & state.keys())
        if expected[name].is_floating_point() and not state[name].is_floating_point()
    ]
    if types:
        faults.append(f"it has {summarize_tensors(types)} that are not in floating point")
    if faults:
        raise WeightsError(
            f"{origin} does not fit its configuration as a {module}: {'; '.join(faults)}; weights and "
            "configuration must be of one model."
        )


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]], origin: str) -> None:
    """Checks that every number is finite in the type in which it is used.

    It passes over each tensor once and copies none; on a GPU it waits once for all of them.

    Raises:
        WeightsError: NaN or infinite numbers are among them; the message names the first few tensors.
    """
    names, extremes = [], []
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.numel() and not tensor.is_meta:
            names.append(name)
            # NaN or infinity always shows in the minimum or the maximum; `isfinite` would take a hundred
            # times as long.
            extremes.append(torch.stack(torch.aminmax(tensor.detach())).double())
    if not names:
        return
    finite = torch.isfinite(torch.stack(extremes)).all(1).tolist()
    if not all(finite):
        wrong = [name for name, is_finite in zip(names, finite, strict=True) if not is_finite]
        raise WeightsError(
            f"{origin} holds numbers that are not finite (NaN or infinity) in {summarize_tensors(wrong)}."
        )


def summarize_tensors(names: list[str]) -> str:
    """How many tensors, and the first few: `1 tensor (a)`, `5 tensors (a, b, c, …)`."""
    count = f"{len(names)} tensor{'' if len(names) == 1 else 's'}"
    return f"{count} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
