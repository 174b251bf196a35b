"""Slices of long layers: the result is the same to the last bit, and there is little work between reports."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from random_encodec import encodec, noise
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from musicgen_svc.models import slices
from musicgen_svc.models.encodec import Codec
from musicgen_svc.models.slices import ELEMENT_WORK, PIECE, SLICE_WORK, InSlices


@pytest.fixture(autouse=True)
def only_results() -> Iterator[None]:
    with torch.no_grad():
        yield


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def seeded(make: Callable[..., nn.Module], *args: Any, **options: Any) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return make(*args, **options).eval()


class Part(nn.Module):
    """Cuts off both ends, as after padding: the rows of the result are not contiguous."""

    def forward(self, x: Tensor) -> Tensor:
        return x[..., 3:-2]


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "convolution": (seeded(nn.Conv1d, 64, 32, 3), (1, 64, 400_001)),
    "strided convolution": (seeded(nn.Conv1d, 64, 128, 8, stride=4), (1, 64, 160_003)),
    "dilated convolution": (seeded(nn.Conv1d, 64, 64, 3, dilation=9), (1, 64, 200_000)),
    "padded convolution": (seeded(nn.Conv1d, 48, 48, 8, stride=4, padding=2), (1, 48, 800_000)),
    "two signals": (seeded(nn.Conv1d, 64, 64, 3, padding=1), (2, 64, 100_001)),
    "transposed convolution": (seeded(nn.ConvTranspose1d, 128, 64, 8, stride=4), (1, 128, 40_001)),
    "padded transposed": (seeded(nn.ConvTranspose1d, 128, 64, 8, 4, padding=2), (1, 128, 40_001)),
    "LSTM": (seeded(nn.LSTM, 512, 512, 2), (700, 1, 512)),
    "LSTM, batch first": (seeded(nn.LSTM, 512, 512, 2, batch_first=True), (1, 700, 512)),
    "ELU": (nn.ELU(), (1, 5, PIECE // 2 + 7)),
    "ELU of a part": (nn.Sequential(Part(), nn.ELU()), (2, 3, PIECE // 2 + 7)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("number", [1, 2])
def test_slices_are_the_whole_to_the_last_bit(name: str, number: int) -> None:
    layer, shape = LAYERS[name]
    x = drawn(*shape)
    reports: list[int] = []
    with threads(number):
        whole = layer(x)
        with InSlices(partial(reports.append, 1)):
            ours = layer(x)
    whole, ours = (y if isinstance(y, tuple) else (y, ()) for y in (whole, ours))
    assert ours[0].shape == whole[0].shape and torch.equal(ours[0], whole[0])
    assert all(torch.equal(a, b) for a, b in zip(ours[1], whole[1], strict=True)), "the state"
    sliced_alone = isinstance(layer, nn.ConvTranspose1d | nn.ELU | nn.Sequential)
    assert len(reports) >= 2 or (sliced_alone and number > 1)


def test_sums_and_padding_in_pieces_are_the_whole_too() -> None:
    x, y = drawn(1, 3, PIECE), drawn(3, 1, PIECE).transpose(0, 1)
    for whole in (lambda: x + x, lambda: x + y, lambda: x + 1, lambda: nn.functional.pad(x, (3, 5))):
        reports: list[int] = []
        expected = whole()
        with InSlices(partial(reports.append, 1)):
            assert torch.equal(whole(), expected)
        assert reports


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(2, 4, 3, padding="same"), (1, 2, 100)),
        (nn.Conv1d(2, 4, 3, padding=1, padding_mode="reflect"), (1, 2, 100)),
        (nn.Conv1d(2, 4, 5, padding=9), (1, 2, 30)),
        (nn.Conv1d(4, 4, 5, groups=2, bias=False), (3, 4, 100)),
        (nn.Conv1d(2, 4, 3), (2, 100)),
        (nn.ConvTranspose1d(2, 4, 9, stride=2, padding=3, dilation=2), (2, 2, 50)),
        (nn.ConvTranspose1d(2, 4, 3, stride=3, output_padding=2), (1, 2, 50)),
        (nn.ConvTranspose1d(4, 4, 3, stride=5, groups=2, bias=False), (1, 4, 50)),
        (nn.ConvTranspose1d(2, 4, 3), (2, 100)),
        (nn.LSTM(4, 4, bidirectional=True), (50, 1, 4)),
        (nn.GRU(4, 4), (50, 1, 4)),
    ],
    ids=str,
)
def test_every_setting_of_a_layer_gives_its_result(
    monkeypatch: pytest.MonkeyPatch, layer: nn.Module, shape: tuple[int, ...]
) -> None:
    """The slices have a few steps only, and may round differently."""
    monkeypatch.setattr(slices, "SLICE_WORK", 5_000)
    x = drawn(*shape)
    with threads(1):
        whole = layer(x)
        with InSlices(lambda: None):
            ours = layer(x)
    torch.testing.assert_close(ours, whole)


def test_little_is_computed_between_two_ticks_of_the_codec(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts multiplications. The limit is smaller because the codec is smaller."""
    limit = 2_000_000
    monkeypatch.setattr(slices, "SLICE_WORK", limit)
    codec = Codec(encodec(n_filters=16))
    wav = noise(10)
    tokens = codec.encode(wav)
    stretches: list[float] = []

    def tick(done: int, total: int) -> None:
        stretches.append(counter.get_total_flops() / 2 - sum(stretches))

    with threads(1), FlopCounterMode(display=False) as counter:
        codec.encode(wav, tick)
        codec.decode(tokens, tick)
    assert sum(stretches) > 200 * limit
    # Some slices have one more step than others; the quantizer is not sliced.
    assert max(stretches) < 2 * limit


def test_a_slice_is_a_tenth_of_a_second_at_most_of_a_slow_core() -> None:
    assert SLICE_WORK / 10e9 <= 0.11  # 10 GMAC/s: AVX2 at 1.3 GHz
    assert 0 < ELEMENT_WORK < 1000


def test_a_report_that_raises_ends_the_layer() -> None:
    layer, shape = LAYERS["convolution"]

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), InSlices(stop):
        layer(drawn(*shape))
    layer(drawn(1, 64, 10))  # outside of the context nothing is reported
