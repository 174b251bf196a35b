"""The results of `scripts/bench`, as JSON and as a table."""

import json
import platform
import resource
import statistics
import subprocess
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.agreement import Agreement
from benchmarks.growth import Growth
from benchmarks.launches import StepProfile
from benchmarks.workload import GB

FRAME_RATE_HZ = 50


@dataclass
class Row:
    """The results with one number of slots. The lists have one entry per pair."""

    slots: int
    model: str = ""
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
    profile: StepProfile | None = None
    """What a step of the engine on a GPU consists of."""

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
        """Medians, by the names that `--at-least` and `--at-most` take."""
        found = {
            "steps": statistics.median(self.engine_steps_per_s),
            "ratio": statistics.median(self.ratio),
            "real-time": statistics.median(self.times_real_time),
        }
        return found if self.growth is None else found | {"growth": self.growth.ratio}

    def _ratio(self, theirs: list[float]) -> list[float]:
        pairs = zip(self.engine_steps_per_s, theirs, strict=True)
        return [self.slots * ours / their for ours, their in pairs]

    @property
    def latest(self) -> str:
        """The figures of the latest pair, on one line."""
        transformers = [f"transformers {steps:.1f}" for steps in self.transformers_steps_per_s[-1:]]
        return ", ".join(
            [
                f"{self.model}, {self.slots} slot(s): {self.engine_steps_per_s[-1]:.1f} steps/s",
                f"{self.times_real_time[-1]:.1f} x real time",
                f"audiocraft {self.audiocraft_steps_per_s[-1]:.1f} steps/s",
                *transformers,
                f"ratio {self.ratio[-1]:.2f}",
            ]
        )

    @property
    def closer(self) -> list[str]:
        """Lines on the time of an early and of a late step, and on each kernel of a step, where known."""
        lines, name = [], f"{self.model}, {self.slots} slot(s)"
        if (g := self.growth) is not None:
            early_us, late_us, cache_us = (1e6 * s for s in (g.early_s, g.late_s, g.cache_s))
            lines.append(
                f"{name}: step {g.early_step} {early_us:.0f} us, step {g.late_step} {late_us:.0f} us, "
                f"ratio {g.ratio:.3f}; without {cache_us:.0f} us for more cache {g.ratio_beyond_cache:.3f}"
            )
        if (profile := self.profile) is not None:
            lines.append(f"{name}, profiled: {profile.us:.0f} us a step, {spelled(profile.per_step)}")
            lines += [
                f"{kernel.us:9.2f} us x {kernel.per_step:6.1f} = {kernel.share:6.1%}  {kernel.name:.90}"
                for kernel in profile.kernels
            ]
        return lines

    def as_json(self) -> dict[str, Any]:
        """Everything for the JSON file, ratios included."""
        found = asdict(self)
        del found["chunks_s"]
        found["ratio"], found["times_real_time"] = self.ratio, self.times_real_time
        found["ratio_to_transformers"] = self.ratio_to_transformers
        if self.growth is not None:
            found["growth"] |= {
                "ratio": self.growth.ratio,
                "ratio_beyond_cache": self.growth.ratio_beyond_cache,
            }
        return found


@dataclass
class Report:
    """The content of the file of results."""

    head: dict[str, Any]
    """What holds for all rows."""
    file: Path | None
    """None: no file is written."""
    rows: list[Row] = field(default_factory=list)

    def save(self, **more: Any) -> None:
        """Adds entries to the head, and writes everything that is known."""
        self.head |= more
        if self.file is not None:
            rows = {"rows": [row.as_json() for row in self.rows]} if self.rows else {}
            self.file.write_text(json.dumps(self.head | rows, indent=2) + "\n")


def show(result: dict[str, Any], rows: list[Row]) -> None:
    """Prints the results."""
    print(
        f"{result['model']}, {result['seconds']:g} s, {result['precision']}, torch {result['torch']}, "
        f"{result['device']} ({result['cpu']}, {result['threads']} threads)"
    )
    table([cells(row, result["copy_gb_per_s"]) for row in rows])
    for row in rows:
        if (a := row.agreement) is not None:
            differs = "never" if a.first_divergence is None else f"from frame {a.first_divergence}"
            print(
                f"{row.slots} slot(s): top-1 agreement with audiocraft {a.top1:.1%} in {a.frames} frames; "
                f"differs {differs}"
            )
    for name in ("audiocraft_per_step", "against_reference", "beside"):
        if name in result:
            print(f"{name.replace('_', ' ')}: {spelled(result[name])}")
    print(f"peak memory {result['peak_gb']:.1f} GB")


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


def of_three(values: list[float]) -> str:
    """Least, median and greatest value."""
    return f"{min(values):.2f} / {statistics.median(values):.2f} / {max(values):.2f}"


def spelled(figures: dict[str, float]) -> str:
    """Names and values, on one line."""
    return ", ".join(f"{name} {value:.3g}" for name, value in figures.items())


def machine(device: torch.device) -> dict[str, Any]:
    """What the results depend on: commit, versions, device, driver, CPU, threads."""
    on_gpu = device.type == "cuda"
    return {
        "commit": output_of("git", "rev-parse", "HEAD"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if on_gpu
        else None,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
    }


def output_of(*command: str) -> str | None:
    """The first line that a command prints. None: there is no such command, it fails, or prints nothing."""
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return ended.stdout.partition("\n")[0].strip() or None


def version_of(distribution: str) -> str | None:
    """The version of a distribution. None: it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


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
