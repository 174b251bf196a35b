"""Windows have no gap and the right overlap, and are the same as those of audiocraft's loop."""

from hypothesis import given
from hypothesis import strategies as st

from musicgen_svc.windows import Window, plan, stride_frames


def audiocraft_windows(total: int, prompt: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """Returns the calls that `MusicGen._generate_tokens` makes: start, prompt and length in frames."""
    if total <= window:
        return [(0, prompt, total)]
    calls, offset = [], 0
    while offset + prompt < total:
        length = min(total - offset, window)
        calls.append((offset, prompt, length))
        prompt, offset = length - stride, offset + stride
    return calls


lengths = st.tuples(st.integers(2, 1600), st.integers(0, 1500), st.integers(1, 4000), st.data())


@given(lengths)
def test_windows_cover_the_piece_without_gap_or_repetition(
    drawn: tuple[int, int, int, st.DataObject],
) -> None:
    window, known, fresh, data = drawn
    known = min(known, window - 1)
    stride = data.draw(st.integers(1, window - 1))
    total = known + fresh
    reached = known
    previous = None
    for w in plan(total, known, window, stride):
        assert w.start + w.known == reached, "a window's known frames must end where the frames so far end"
        assert w.known < w.length <= window
        if previous is not None:
            assert w.start == previous.start + stride
        reached, previous = w.start + w.length, w
    assert reached == total


@given(lengths)
def test_windows_equal_audiocrafts(drawn: tuple[int, int, int, st.DataObject]) -> None:
    window, known, fresh, data = drawn
    known = min(known, window - 1)
    stride = data.draw(st.integers(1, window - 1))
    ours = [(w.start, w.known, w.length) for w in plan(known + fresh, known, window, stride)]
    assert ours == audiocraft_windows(known + fresh, known, window, stride)


def test_the_windows_of_the_released_models() -> None:
    assert list(plan(1500, 0, 1500, 900)) == [Window(0, 0, 1500)]
    assert list(plan(1550, 0, 1500, 900)) == [Window(0, 0, 1500), Window(900, 600, 650)]


def test_the_stride_fits_every_window() -> None:
    assert stride_frames(1500, 50) == 900
    assert all(0 < stride_frames(window, 50) < window for window in range(2, 2000))
