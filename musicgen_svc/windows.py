"""Plans the windows that generate a piece of a given length. Pure arithmetic, no tensors.

A piece longer than the model's training window (30 s) is generated window by window, as in audiocraft's
`MusicGen`: each window starts `stride` frames after the previous one, so the frames of the overlap are
known. audiocraft calls them the window's prompt; here a prompt is a text.
"""

from collections.abc import Iterator
from dataclasses import dataclass

STRIDE_S = 18.0
"""The default `extend_stride` of audiocraft, for its window of 30 s."""


@dataclass(frozen=True)
class Window:
    """One call of the engine. All numbers are in frames."""

    start: int
    """The position of the window's first frame in the piece."""
    known: int
    """How many of the window's first frames are already known."""
    length: int
    """The length of the window, including the known frames."""


def plan(total: int, known: int, window: int, stride: int) -> Iterator[Window]:
    """Yields the windows that extend `known` frames to `total` frames.

    Args:
        total: frames of the finished piece, including the known ones.
        known: frames known at the start; fewer than `window`.
        window: frames of the longest window.
        stride: frames from the start of one window to the start of the next; less than `window`.
    """
    assert 0 <= known < min(window, total), (known, window, total)
    assert 0 < stride < window, (stride, window)
    start = 0
    while start + known < total:
        length = min(total - start, window)
        yield Window(start, known, length)
        start, known = start + stride, length - stride


def stride_frames(window: int, frame_rate: float) -> int:
    """Returns the stride in frames: 18 s as in audiocraft, or 60 % of a window that is not longer than that.

    Args:
        window: the model's window in frames.
        frame_rate: frames per second.
    """
    stride = int(STRIDE_S * frame_rate)
    return stride if stride < window else max(1, window * 3 // 5)
