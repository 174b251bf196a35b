"""The results of `scripts/bench`, as JSON and as a table."""

import platform
import resource
import statistics
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.agreement import Agreement
from benchmarks.growth import Growth
from benchmarks.workload import GB

FRAME_RATE_HZ = 50


@dataclass
class Row:
    """The results with one number of slots. The lists have one entry per pair."""

    slots: int
    audiocraft_steps_per_s: list[float] = field(default_factory=list)
    transformers_steps_per_s: list[float] = field(default_factory=list)
    engine_steps_per_s: list[float] = field(default_factory=list)
    gb_per_s: list[float] = field(default_factory=list)
    chunks_s: list[list[float]] = field(default_factory=list)
    """Seconds of each chunk of the engine's steps."""
    tokens: str = ""
    """How the tokens compare, in a few words."""
    agreement: Agreement | None = None
    growth: Growth | None = None
    per_step: dict[str, float] | None = None
    """Launches, syncs and kernels of one step of the engine on a GPU."""

    @property
    def ratio(self) -> list[float]:
        """Audio per second of all our slots, over that of audiocraft's one request."""
        return self._ratio(self.audiocraft_steps_per_s)

    @property
    def ratio_to_transformers(self) -> list[float]:
        """Audio per second of all our slots, over that of transformers' one request. Empty: not asked for."""
        return self._ratio(self.transformers_steps_per_s) if self.transformers_steps_per_s else []

    @property
    def times_real_time(self) -> list[float]:
        """Seconds of audio that the engine decodes in a second, all slots together."""
        return [self.slots * steps / FRAME_RATE_HZ for steps in self.engine_steps_per_s]

    @property
    def figures(self) -> dict[str, float]:
        """Medians, by the names that `--at-least` takes."""
        return {
            "steps": statistics.median(self.engine_steps_per_s),
            "ratio": statistics.median(self.ratio),
            "real-time": statistics.median(self.times_real_time),
        }

    def _ratio(self, theirs: list[float]) -> list[float]:
        pairs = zip(self.engine_steps_per_s, theirs, strict=True)
        return [self.slots * ours / their for ours, their in pairs]

    def as_json(self) -> dict[str, Any]:
        """Everything for the JSON file, ratios included."""
        found = asdict(self)
        del found["chunks_s"]
        found["ratio"], found["times_real_time"] = self.ratio, self.times_real_time
        found["ratio_to_transformers"] = self.ratio_to_transformers
        if self.growth is not None:
            found["growth"]["ratio_beyond_cache"] = self.growth.ratio_beyond_cache
        return found


def show(result: dict[str, Any], rows: list[Row]) -> None:
    """Prints the results."""
    print(
        f"{result['model']}, {result['seconds']:g} s, {result['precision']}, torch {result['torch']}, "
        f"{result['device']} ({result['cpu']}, {result['threads']} threads)"
    )
    table([cells(row, result["copy_gb_per_s"]) for row in rows])
    for row in rows:
        for line in remarks(row):
            print(f"{row.slots} slot(s): {line}")
    if result["audiocraft_per_step"]:
        print("audiocraft, one step:", spelled(result["audiocraft_per_step"]))
    if result["against_reference"]:
        print("against reference:", spelled(result["against_reference"]))
    print(f"peak memory {result['peak_gb']:.1f} GB", *(f"{k} {v:.2f}" for k, v in result["beside"].items()))


def cells(row: Row, copy_gb_per_s: float) -> dict[str, str]:
    """One line of the table: column -> text."""
    read = statistics.median(row.gb_per_s)
    found = {
        "slots": str(row.slots),
        "audiocraft steps/s": f"{statistics.median(row.audiocraft_steps_per_s):.2f}",
        "engine steps/s": f"{statistics.median(row.engine_steps_per_s):.2f}",
        "ratio min / median / max": of_three(row.ratio),
    }
    if row.transformers_steps_per_s:
        found["transformers steps/s"] = f"{statistics.median(row.transformers_steps_per_s):.2f}"
        found["ratio to transformers"] = of_three(row.ratio_to_transformers)
    return found | {
        "x real time": f"{statistics.median(row.times_real_time):.2f}",
        "GB/s": f"{read:.1f}",
        "of copy": f"{read / copy_gb_per_s:.0%}",
        "tokens": row.tokens,
    }


def table(rows: list[dict[str, str]]) -> None:
    """Prints rows of cells, aligned."""
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    for row in [{name: name for name in widths}, *rows]:
        print("  ".join(f"{row[name]:>{width}}" for name, width in widths.items()))


def remarks(row: Row) -> list[str]:
    """Lines below the table: growth, launches and agreement."""
    lines = []
    if row.growth is not None:
        g = row.growth
        lines.append(
            f"step {g.early_step}: {g.early_s * 1e3:.2f} ms, step {g.late_step}: {g.late_s * 1e3:.2f} ms, of "
            f"which {g.cache_s * 1e3:.2f} ms are the longer cache: x {g.ratio_beyond_cache:.2f} beyond it"
        )
    if row.per_step is not None:
        lines.append("one step: " + spelled(row.per_step))
    if row.agreement is not None:
        a = row.agreement
        differs = "never" if a.first_divergence is None else f"from frame {a.first_divergence}"
        lines.append(f"top-1 agreement with audiocraft {a.top1:.1%} in {a.frames} frames; differs {differs}")
    return lines


def of_three(values: list[float]) -> str:
    """Least, median and greatest value."""
    return f"{min(values):.2f} / {statistics.median(values):.2f} / {max(values):.2f}"


def spelled(figures: dict[str, float]) -> str:
    """Names and values, on one line."""
    return ", ".join(f"{name} {value:.3g}" for name, value in figures.items())


def machine(device: torch.device) -> dict[str, Any]:
    """What the results depend on: commit, torch, device, CPU, threads."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "commit": commit.stdout.strip() or None,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
    }


def cpu_name() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
    return names[0] if names else platform.processor()


def peak_memory(device: torch.device) -> float:
    """Peak memory of the process in GB: on the GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB
