"""audiocraft's decoding loop and ours, in one process, in turn: as fast as is claimed, and the same tokens?

    scripts/bench --model small --seconds 10 --slots 1,4 --device cpu --json result.json

The model has its real size and random weights: no download. After a warm-up each pair runs
audiocraft first and the engine second, so that whatever else the machine does falls on both; ratios
are taken within pairs. On a CPU in `reference` precision the tokens must be equal, or the command fails.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from _random_models import SIZES, Conditions, audiocraft_generates, conditions, language_model
from torch import Tensor

from musicgen_svc.compat import LMModel
from musicgen_svc.engine.engine import Engine
from musicgen_svc.engine.projections import Precision
from musicgen_svc.request import SamplingParams

FRAME_RATE_HZ = 50
GB = 1e9


@dataclass
class Row:
    """One number of slots. The lists have one entry per pair."""

    slots: int
    audiocraft_steps_per_s: list[float] = field(default_factory=list)
    engine_steps_per_s: list[float] = field(default_factory=list)
    gb_per_s: list[float] = field(default_factory=list)
    tokens: str = ""

    @property
    def ratio(self) -> list[float]:
        """Audio per second, ours over audiocraft's one request."""
        pairs = zip(self.engine_steps_per_s, self.audiocraft_steps_per_s, strict=True)
        return [self.slots * ours / theirs for ours, theirs in pairs]

    @property
    def times_real_time(self) -> list[float]:
        return [self.slots * steps / FRAME_RATE_HZ for steps in self.engine_steps_per_s]


@dataclass(frozen=True)
class Workload:
    lm: LMModel
    given: Sequence[Conditions]
    frames: int
    sampling: SamplingParams
    device: torch.device

    @property
    def columns(self) -> int:
        return self.frames + max(self.lm.pattern_provider.delays)

    def audiocraft(self, seed: int = 0) -> Tensor:
        autocast = torch.autocast(self.device.type, torch.float16, enabled=self.device.type == "cuda")
        with autocast:
            return audiocraft_generates(
                self.lm, self.given[0], prompt=None, length=self.frames, sampling=self.sampling, seed=seed
            )

    def engine(self, engine: Engine, slots: int) -> list[Tensor]:
        """Request i has condition and seed i; they run side by side from the first step on."""
        opened = [
            engine.open(
                self.given[i], prompt=None, length=self.frames, sampling=self.sampling,
                generator=torch.Generator().manual_seed(i),
            )
            for i in range(slots)
        ]  # fmt: skip
        try:
            while not all(slot.done for slot in opened):
                engine.step()
            return [slot.codes for slot in opened]
        finally:
            for slot in opened:
                engine.close(slot)


def main() -> int:
    args = arguments()
    device = torch.device(args.device)
    slots = [int(n) for n in args.slots.split(",")]
    size = SIZES[args.model]
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    lm = language_model(**size, dtype=dtype, device=device)
    given = [
        {name: (tensor.to(device), mask.to(device)) for name, (tensor, mask) in c.items()}
        for c in (conditions(size["kind"], dim=size["dim"], seed=i) for i in range(max(slots)))
    ]
    sampling = SamplingParams(temperature=0 if args.greedy else 1)
    work = Workload(lm, given, round(args.seconds * FRAME_RATE_HZ), sampling, device)
    engine = Engine(lm, slots=max(slots), precision=args.precision)
    copied = copy_bandwidth(device)

    warm_up = Workload(lm, given, 4, sampling, device)
    warm_up.audiocraft()
    for n in slots:
        warm_up.engine(engine, n)
    rows = [Row(n) for n in slots]
    for _ in range(args.pairs):
        measure_pair(work, engine, rows, device)
    result = {
        "model": args.model,
        "seconds": args.seconds,
        "precision": args.precision,
        "sampling": asdict(sampling),
        **machine(device),
        "copy_gb_per_s": copied,
        "peak_gb": peak_memory(device),
        "rows": [asdict(r) | {"ratio": r.ratio, "times_real_time": r.times_real_time} for r in rows],
        "teacher_forced": None if args.precision == "reference" else teacher_forced(work, args.precision),
        "beside": {} if args.engine_only else beside(args.seconds, device),
    }
    show(result, rows)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    exact = device.type == "cpu" and args.precision == "reference"
    if exact and any(row.tokens != "equal" for row in rows):
        print("The engine's tokens are not audiocraft's.", file=sys.stderr)
        return 1
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="small")
    parser.add_argument("--seconds", type=float, default=10, help="of audio, at most 30 (default: 10)")
    parser.add_argument("--slots", default="1", help="requests at once, as 1,4,16 (default: 1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=get_args(Precision), default="reference")
    parser.add_argument("--pairs", type=int, default=3, help="of runs, audiocraft's and ours (default: 3)")
    parser.add_argument("--greedy", action="store_true", help="the most likely token, no draw")
    parser.add_argument("--engine-only", action="store_true", help="leave out EnCodec and T5")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def measure_pair(work: Workload, engine: Engine, rows: list[Row], device: torch.device) -> None:
    """audiocraft once, then the engine with each number of slots."""
    expected, their_s = timed(work.audiocraft, device)
    for row in rows:
        tokens, our_s = timed(lambda slots=row.slots: work.engine(engine, slots), device)
        row.audiocraft_steps_per_s.append(work.columns / their_s)
        row.engine_steps_per_s.append(work.columns / our_s)
        row.gb_per_s.append(bytes_per_step(work, row.slots) * work.columns / our_s / GB)
        differs = (tokens[0] != expected).any(dim=0).nonzero()
        row.tokens = "equal" if len(differs) == 0 else f"differ from frame {int(differs[0])}"


def timed(run: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    synchronize(device)
    start = time.perf_counter()
    result = run()
    synchronize(device)
    return result, time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bytes_per_step(work: Workload, slots: int) -> float:
    """What a step cannot avoid reading in the model's dtype: weights once, the cache's mean length."""
    lm = work.lm
    read = sum(p.numel() for name, p in lm.named_parameters() if not name.startswith("emb."))
    if lm.transformer.layers[0].cross_attention is not None:
        read -= len(lm.transformer.layers) * 2 * lm.dim**2  # the text's keys and values are computed once
    prefix = sum(
        tensor.shape[1] for n, (tensor, _) in work.given[0].items() if lm.fuser.cond2fuse[n] == "prepend"
    )
    cached = slots * 2 * 2 * len(lm.transformer.layers) * lm.dim * (prefix + work.columns / 2)
    return (read + cached) * lm.emb[0].weight.element_size()


def copy_bandwidth(device: torch.device, megabytes: int = 512) -> float:
    """GB/s, read and written together, of the best of five copies."""
    source = torch.ones(megabytes * 2**20 // 4, device=device)
    target = torch.empty_like(source)
    seconds = min(timed(lambda: target.copy_(source), device)[1] for _ in range(5))
    return 2 * source.numel() * 4 / seconds / GB


def peak_memory(device: torch.device) -> float:
    """GB that the process held at most: on the GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB


@torch.inference_mode()
def teacher_forced(work: Workload, precision: Precision, frames: int = 64) -> dict[str, float]:
    """How a faster precision's logits differ from the reference's where both read the same tokens.

    The guided logits are compared, as they are what tokens are drawn from.
    """
    engines = [Engine(work.lm, precision=p, static=False) for p in ("reference", precision)]
    exact, rough = (
        engine.open(
            work.given[0], prompt=None, length=frames, sampling=SamplingParams(temperature=0),
            generator=torch.Generator(),
        )
        for engine in engines
    )  # fmt: skip
    agreed, divergence = [], []
    while True:
        p, q = (slot.logits.float().log_softmax(-1) for slot in (exact, rough))
        agreed.append((p.argmax(-1) == q.argmax(-1)).float().mean())
        divergence.append((p.exp() * (p - q)).sum(-1).mean())
        if exact.done:
            break
        rough.columns.copy_(exact.columns)
        for engine in engines:
            engine.step()
    return {
        "top1_agreement": float(torch.stack(agreed).mean()),
        "mean_kl_nats": float(torch.stack(divergence).mean()),
        "max_kl_nats": float(torch.stack(divergence).max()),
    }


def beside(seconds: float, device: torch.device) -> dict[str, float]:
    """Seconds that a request spends outside the engine, on modules of the real size."""
    from transformers import EncodecConfig, EncodecModel, T5Config, T5EncoderModel

    t5 = T5EncoderModel(T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12))
    codec = EncodecModel(
        EncodecConfig(
            sampling_rate=32_000, audio_channels=1, num_filters=64, upsampling_ratios=[8, 5, 4, 4],
            codebook_size=2048, target_bandwidths=[2.2], use_causal_conv=False, normalize=False,
        )
    )  # fmt: skip
    t5, codec = t5.to(device).eval(), codec.to(device).eval()
    words = torch.ones(1, 12, dtype=torch.long, device=device)
    codes = torch.zeros(1, 1, 4, round(seconds * FRAME_RATE_HZ), dtype=torch.long, device=device)
    with torch.inference_mode():
        t5(words)
        return {
            "t5_s": timed(lambda: t5(words), device)[1],
            "encodec_decode_s": timed(lambda: codec.decode(codes, [None]), device)[1],
        }


def machine(device: torch.device) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "commit": commit.stdout.strip() or None,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
    return names[0] if names else platform.processor()


def show(result: dict[str, Any], rows: list[Row]) -> None:
    print(
        f"{result['model']}, {result['seconds']:g} s, {result['precision']}, torch {result['torch']}, "
        f"{result['device']} ({result['cpu']}, {result['threads']} threads)"
    )
    header = ("slots", "audiocraft steps/s", "engine steps/s", "ratio min / median / max", "x real time")
    print("".join(f"{name:>26}" for name in (*header, "GB/s", "of copy", "tokens")))
    for row in rows:
        ratio, read = row.ratio, statistics.median(row.gb_per_s)
        cells = (
            str(row.slots),
            f"{statistics.median(row.audiocraft_steps_per_s):.2f}",
            f"{statistics.median(row.engine_steps_per_s):.2f}",
            f"{min(ratio):.2f} / {statistics.median(ratio):.2f} / {max(ratio):.2f}",
            f"{statistics.median(row.times_real_time):.2f}",
            f"{read:.1f}",
            f"{read / result['copy_gb_per_s']:.0%}",
            row.tokens,
        )
        print("".join(f"{cell:>26}" for cell in cells))
    if result["teacher_forced"]:
        print("against reference:", ", ".join(f"{k} {v:.3g}" for k, v in result["teacher_forced"].items()))
    print(f"peak memory {result['peak_gb']:.1f} GB", *(f"{k} {v:.2f}" for k, v in result["beside"].items()))


if __name__ == "__main__":
    sys.exit(main())
