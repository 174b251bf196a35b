"""Plots the losses of the training, and the chroma of pieces beside that of their scores."""

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from numpy.typing import NDArray

NAMES = ["C", "C♯", "D", "D♯", "E", "F", "F♯", "G", "G♯", "A", "A♯", "B"]


def plot_losses(work: Path, file: Path) -> None:
    """Plots each log in `work` as one panel, with one line for each figure in it."""
    logs = sorted(work.glob("*-log.jsonl"))
    figure = Figure(figsize=(6 * max(len(logs), 1), 4))
    panels = figure.subplots(1, max(len(logs), 1), squeeze=False)
    for log, panel in zip(logs, panels[0], strict=False):
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        for name in sorted({name for line in lines for name in line} - {"step"}):
            known = [(line["step"], line[name]) for line in lines if name in line]
            panel.plot(*zip(*known, strict=True), label=name, linewidth=1)
        panel.set(title=log.name.removesuffix("-log.jsonl"), xlabel="step")
        panel.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def plot_chroma(rows: dict[str, NDArray[Any]], seconds_a_frame: float, file: Path) -> None:
    """Plots the chroma [S, 12] of each row below each other, on one time axis."""
    figure = Figure(figsize=(10, 2.1 * len(rows)))
    panels = figure.subplots(len(rows), 1, sharex=True, squeeze=False)
    for (title, chroma), panel in zip(rows.items(), panels[:, 0], strict=True):
        extent = (0, len(chroma) * seconds_a_frame, -0.5, 11.5)
        panel.imshow(chroma.T, origin="lower", aspect="auto", extent=extent, cmap="magma", vmin=0, vmax=1)
        panel.set_yticks(range(12), NAMES, fontsize=6)
        panel.set_title(title, fontsize=9, loc="left")
    panels[-1, 0].set_xlabel("seconds")
    figure.tight_layout()
    figure.savefig(file, dpi=110)
