"""What `scripts/predict` shows on standard error: notes and the progress of a prediction."""

import sys
import time

from tqdm import tqdm

REPORT_S = 5.0
"""How often progress is printed where standard error is no terminal."""


def note(text: str) -> None:
    """Writes a line to standard error, above a bar that is shown."""
    tqdm.write(text, file=sys.stderr)


class Progress:
    """Shows progress: as a bar on a terminal, elsewhere as a line every few seconds."""

    def __init__(self) -> None:
        layout = "{desc:<10}{percentage:3.0f}%|{bar}| {elapsed}"
        self._bar = tqdm(total=100, bar_format=layout) if sys.stderr.isatty() else None
        self._percent, self._reported_s = 0, -REPORT_S

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.leave = kind is None
            self._bar.close()

    def show(self, percent: int, stage: str) -> None:
        """Shows how far the prediction is. Without a terminal nothing is shown for 0 %."""
        if self._bar is not None:
            self._bar.set_description_str(stage or self._bar.desc, refresh=False)
            self._bar.update(max(0, percent - self._bar.n))
            self._bar.refresh()  # even without progress, because the elapsed time changes
        elif percent > self._percent and (percent == 100 or time.monotonic() - self._reported_s >= REPORT_S):
            self._percent, self._reported_s = percent, time.monotonic()
            note(f"{stage or 'working':<10}{percent:3d}%")
