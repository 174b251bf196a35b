"""The work that `scripts/bench` measures, how each side does it, and how many bytes a step must read."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.random_models import Conditions, audiocraft_generates
from musicgen_svc.audiocraft_compat import LMModel
from musicgen_svc.engine.batch import Batch, DecodeRequest
from musicgen_svc.engine.projections import Precision, packs_float16
from musicgen_svc.engine.sampling_params import SamplingParams
from musicgen_svc.engine.static import CHUNK

GB = 1e9

WEIGHT_BYTES = {"float16": 2, "bfloat16": 2, "int8": 1}
"""Bytes of one weight, for the precisions that define it."""


@dataclass(frozen=True)
class Workload:
    """A model and the requests that every side decodes with it."""

    lm: LMModel
    given: Sequence[Conditions]
    """Of each request."""
    frames: int
    """Of each request."""
    sampling: SamplingParams
    device: torch.device

    @property
    def columns(self) -> int:
        """Steps of the language model: the frames, and the delay of the last codebook."""
        return self.frames + self.longest_delay

    @property
    def longest_delay(self) -> int:
        """Delay of the last codebook, in frames."""
        longest: int = max(self.lm.pattern_provider.delays)
        return longest

    def of(self, frames: int) -> "Workload":
        """Returns the same work with another number of frames."""
        return replace(self, frames=frames)

    def audiocraft(self, seed: int = 0) -> Tensor:
        """Decodes the first request with audiocraft, as its users run it: [K, frames] tokens."""
        autocast = torch.autocast(self.device.type, torch.float16, enabled=self.device.type == "cuda")
        with autocast:
            return audiocraft_generates(
                self.lm, self.given[0], prompt=None, length=self.frames, sampling=self.sampling, seed=seed
            )

    def engine(self, batch: Batch, slots: int, chunks_s: list[float] | None = None) -> list[Tensor]:
        """Decodes as many requests as there are slots, together from the first step on.

        Request i has condition i and seed i. The host waits for the device as often as in the service.

        Args:
            batch: of our engine.
            slots: how many requests.
            chunks_s: a list to which the seconds of every CHUNK steps are appended.

        Returns:
            list: [K, frames] tokens of each request.
        """
        opened = [
            batch.open(
                DecodeRequest(
                    self.given[i], None, self.frames, self.sampling, torch.Generator().manual_seed(i)
                )
            )
            for i in range(slots)
        ]
        try:
            synchronize(self.device)
            since = time.perf_counter()
            while not all(slot.done for slot in opened):
                for _ in range(CHUNK):
                    batch.step()
                synchronize(self.device)
                now = time.perf_counter()
                if chunks_s is not None and not opened[0].done:  # the last chunk may be shorter
                    chunks_s.append(now - since)
                since = now
            return [slot.codes for slot in opened]
        finally:
            for slot in opened:
                batch.close(slot)

    def bytes_per_step(self, slots: int, precision: Precision = "reference") -> float:
        """Bytes that a step must read at least: the weights once, the cache at its mean length."""
        lm = self.lm
        read: int = sum(p.numel() for name, p in lm.named_parameters() if not name.startswith("emb."))
        if lm.transformer.layers[0].cross_attention is not None:
            read -= (
                len(lm.transformer.layers) * 2 * lm.dim**2
            )  # keys and values of the text are computed once
        prefix: int = sum(
            tensor.shape[1]
            for name, (tensor, _) in self.given[0].items()
            if lm.fuser.cond2fuse[name] == "prepend"
        )
        cached = (prefix + self.columns / 2) * self.bytes_per_position(slots)
        kept = 2 if packs_float16(lm.linears[0].weight) else self._itemsize
        return read * WEIGHT_BYTES.get(precision, kept) + cached

    def bytes_per_position(self, slots: int) -> int:
        """Bytes of one position of the cache: keys and values of both rows in every layer."""
        dim: int = self.lm.dim
        return slots * 2 * 2 * len(self.lm.transformer.layers) * dim * self._itemsize

    @property
    def _itemsize(self) -> int:
        """Bytes of one number in the dtype of the layers, which keys and values have too."""
        size: int = self.lm.transformer.layers[0].linear1.weight.element_size()
        return size


def stored_in_float16(lm: LMModel) -> LMModel:
    """Rounds every weight to float16, in place, because all released checkpoints are stored in float16."""
    for parameter in lm.parameters():
        parameter.copy_(parameter.half())
    return lm


def timed[T](run: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """Runs a function and returns its result and the seconds until the device has done the work."""
    synchronize(device)
    start = time.perf_counter()
    result = run()
    synchronize(device)
    return result, time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all work that was given to it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_bandwidth(device: torch.device, megabytes: int = 512) -> float:
    """Measures the memory bandwidth: GB/s, read and written together, of the best of five copies."""
    source = torch.ones(megabytes * 2**20 // 4, device=device)
    target = torch.empty_like(source)
    seconds = min(timed(lambda: target.copy_(source), device)[1] for _ in range(5))
    return 2 * source.numel() * 4 / seconds / GB
