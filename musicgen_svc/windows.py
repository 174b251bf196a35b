"""A length in frames -> the windows that generate it. Pure arithmetic, no tensors.

Beyond what the model was trained on (30 s), generation goes on window by window, as audiocraft's
`MusicGen` does: each window starts `stride` frames after the one before and takes what overlaps as
its prompt.
"""

from collections.abc import Iterator
from dataclasses import dataclass

STRIDE_S = 18.0
"""audiocraft's default `extend_stride`, for its 30 s window."""


@dataclass(frozen=True)
class Window:
    """One call of the decoder, in frames."""

    start: int
    """Where the window begins in the whole piece."""
    prompt: int
    """How many of its first frames are known already."""
    length: int
    """Its frames in all, the prompt included."""


def plan(total: int, prompt: int, window: int, stride: int) -> Iterator[Window]:
    """Yields the windows that take `prompt` known frames to `total` frames.

    Args:
        total: frames of the finished piece, the prompt included.
        prompt: frames known at the start; fewer than `window`.
        window: the longest stretch that the model sees at once.
        stride: how far each window moves on; less than `window`.
    """
    assert 0 <= prompt < min(window, total), (prompt, window, total)
    assert 0 < stride < window, (stride, window)
    start, known = 0, prompt
    while start + known < total:
        length = min(total - start, window)
        yield Window(start, known, length)
        start, known = start + stride, length - stride


def stride_frames(window: int, frame_rate: float) -> int:
    """The stride for a model's window: audiocraft's 18 s, or 60 % of a window too short for that."""
    stride = int(STRIDE_S * frame_rate)
    return stride if stride < window else max(1, window * 3 // 5)
