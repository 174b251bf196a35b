"""Modules on the meta device have the shapes of real ones, and cost no initialisation."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from musicgen_svc.models.meta_init import on_meta


def modules() -> nn.Module:
    """Returns modules of all the types whose initialisation is skipped on the meta device."""
    convolution = nn.Conv1d(3, 5, 7)
    transposed = nn.ConvTranspose1d(3, 5, 7)
    nn.init.trunc_normal_(convolution.weight, std=0.02)
    return nn.ModuleList(
        [
            nn.Embedding(4, 6), nn.Linear(6, 8), nn.LSTM(4, 4, 2), nn.LayerNorm(6),
            nn.utils.weight_norm(convolution), nn.utils.weight_norm(transposed),
            nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 3, 5)),
        ]
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_shapes_are_those_of_the_real_ones_and_no_random_number_is_drawn() -> None:
    real = modules()
    before = torch.random.get_rng_state()
    with on_meta():
        shapes = modules()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert {n: t.shape for n, t in shapes.state_dict().items()} == {
        n: t.shape for n, t in real.state_dict().items()
    }
    assert all(tensor.is_meta for tensor in shapes.state_dict().values())
    shapes.load_state_dict(real.state_dict(), assign=True)
    sound = torch.randn(1, 3, 20)
    for index in (4, 5):
        assert torch.equal(shapes[index](sound), real[index](sound))  # type: ignore[index]


def test_tensors_that_have_values_are_left_alone() -> None:
    with on_meta():
        real = torch.ones(3, device="cpu")
        real.mul_(2)
        nn.init.normal_(drawn := torch.zeros(3, device="cpu"))
    assert real.tolist() == [2, 2, 2] and drawn.abs().sum() > 0


def test_torchs_compiler_is_not_imported() -> None:
    code = (
        "import sys, warnings; warnings.simplefilter('ignore')\n"
        "import test_meta_init\n"
        "with test_meta_init.on_meta():\n"
        "    test_meta_init.modules()\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    root = Path(__file__).resolve().parents[2]
    paths = os.pathsep.join(map(str, (root, root / "tests" / "models")))
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, env=os.environ | {"PYTHONPATH": paths})
