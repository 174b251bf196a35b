"""The benchmark of reduced precision rounds what tensor cores round, and nothing else."""

import torch
from torch import nn

from benchmarks.half_precision import Tf32, snr_db, tf32


def test_tf32_keeps_eleven_bits_and_rounds_halves_to_even() -> None:
    step = 2**-10  # the distance of two numbers of TF32 between 1 and 2
    given = 1 + step * torch.tensor([0, 0.4, 0.5, 0.6, 1, 1.5, 2.5])
    expected = 1 + step * torch.tensor([0.0, 0, 0, 1, 1, 2, 2])
    for scale in (1, -1, 2.0**90, 2.0**-90):
        assert torch.equal(tf32(scale * given), scale * expected)


@torch.no_grad()
def test_convolutions_and_lstms_are_rounded_and_other_layers_are_not() -> None:
    torch.manual_seed(0)
    for layer, x in (
        (nn.Conv1d(8, 8, 3), torch.randn(1, 8, 40)),
        (nn.ConvTranspose1d(8, 8, 4, 2), torch.randn(1, 8, 40)),
        (nn.LSTM(8, 8, 2), torch.randn(40, 1, 8)),
        (nn.Linear(8, 8), torch.randn(40, 8)),
        (nn.ELU(), torch.randn(40, 8)),
    ):

        def run(layer: nn.Module = layer, x: torch.Tensor = x) -> torch.Tensor:
            y = layer(x)
            return y[0] if isinstance(y, tuple) else y

        exact = run()
        with Tf32():
            rounded = run()
        if isinstance(layer, nn.Linear | nn.ELU):
            assert torch.equal(rounded, exact)
        else:
            assert 50 < snr_db(rounded, exact) < 90, layer
    assert snr_db(torch.tensor([1.1]), torch.tensor([1.0])) == 20
