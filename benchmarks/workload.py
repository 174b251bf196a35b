"""What `scripts/bench` has decoded, by each side, and what reading it costs at least."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

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
"""Of one number, where the precision says it."""


@dataclass(frozen=True)
class Workload:
    lm: LMModel
    given: Sequence[Conditions]
    frames: int
    sampling: SamplingParams
    device: torch.device

    @property
    def columns(self) -> int:
        """Steps of the language model."""
        return self.frames + max(self.lm.pattern_provider.delays)

    def of(self, frames: int) -> "Workload":
        return replace(self, frames=frames)

    def audiocraft(self, seed: int = 0) -> Tensor:
        autocast = torch.autocast(self.device.type, torch.float16, enabled=self.device.type == "cuda")
        with autocast:
            return audiocraft_generates(
                self.lm, self.given[0], prompt=None, length=self.frames, sampling=self.sampling, seed=seed
            )

    def engine(self, batch: Batch, slots: int, chunks_s: list[float] | None = None) -> list[Tensor]:
        """Request i has condition and seed i; they run side by side from the first step on.

        The host waits for the device as often as the service does. `chunks_s` is given the seconds of
        every CHUNK steps.
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
                if chunks_s is not None and not opened[0].done:  # the last one may be a part
                    chunks_s.append(now - since)
                since = now
            return [slot.codes for slot in opened]
        finally:
            for slot in opened:
                batch.close(slot)

    def bytes_per_step(self, slots: int, precision: Precision = "reference") -> float:
        """What a step cannot avoid reading: weights once, the cache at its mean length."""
        lm = self.lm
        read = sum(p.numel() for name, p in lm.named_parameters() if not name.startswith("emb."))
        if lm.transformer.layers[0].cross_attention is not None:
            read -= len(lm.transformer.layers) * 2 * lm.dim**2  # the text's keys and values are computed once
        prefix = sum(
            tensor.shape[1]
            for name, (tensor, _) in self.given[0].items()
            if lm.fuser.cond2fuse[name] == "prepend"
        )
        cached = (prefix + self.columns / 2) * self.bytes_per_position(slots)
        kept = 2 if packs_float16(lm.linears[0].weight) else self._itemsize
        return read * WEIGHT_BYTES.get(precision, kept) + cached

    def bytes_per_position(self, slots: int) -> int:
        """Of the cache: keys and values of both rows in every layer."""
        return slots * 2 * 2 * len(self.lm.transformer.layers) * self.lm.dim * self._itemsize

    @property
    def _itemsize(self) -> int:
        """Of the layers' dtype, which keys and values have too."""
        size: int = self.lm.transformer.layers[0].linear1.weight.element_size()
        return size


def stored_in_float16(lm: LMModel) -> LMModel:
    """The same model with every number rounded as a checkpoint in float16 has it: all released ones are."""
    for parameter in lm.parameters():
        parameter.copy_(parameter.half())
    return lm


def timed(run: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    synchronize(device)
    start = time.perf_counter()
    result = run()
    synchronize(device)
    return result, time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_bandwidth(device: torch.device, megabytes: int = 512) -> float:
    """GB/s, read and written together, of the best of five copies."""
    source = torch.ones(megabytes * 2**20 // 4, device=device)
    target = torch.empty_like(source)
    seconds = min(timed(lambda: target.copy_(source), device)[1] for _ in range(5))
    return 2 * source.numel() * 4 / seconds / GB
