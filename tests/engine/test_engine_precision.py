"""A faster precision changes the logits a little, and nothing about requests; projections are products."""

import pytest
import torch
from _random_models import conditions, language_model
from torch import Tensor

from musicgen_svc.engine.engine import Engine
from musicgen_svc.engine.projections import Precision, projection
from musicgen_svc.request import SamplingParams

GREEDY = SamplingParams(temperature=0)


@pytest.mark.parametrize("rows", [1, 2, 8, 33])
@pytest.mark.parametrize(("precision", "tolerance"), [("reference", 1e-5), ("bfloat16", 2e-2)])
def test_a_projection_is_the_product(rows: int, precision: Precision, tolerance: float) -> None:
    draw = torch.Generator().manual_seed(rows)
    x, weight = torch.randn(rows, 1, 96, generator=draw), torch.randn(64, 96, generator=draw)
    exact = (x.double() @ weight.double().T).float()
    product = projection(weight, precision)(x)
    assert product.dtype == x.dtype and product.shape == exact.shape
    assert (product - exact).abs().max() <= tolerance * exact.abs().max()
    if precision == "bfloat16":
        assert not torch.equal(product, exact), "nothing was rounded"


def test_a_slice_of_a_weight_is_the_slice_of_the_product() -> None:
    x, weight = torch.randn(2, 32), torch.randn(96, 32)
    whole = projection(weight, "reference")(x)
    torch.testing.assert_close(projection(weight[:32], "reference")(x), whole[:, :32])


@torch.inference_mode()
def test_bfloat16_stays_close_to_the_reference_on_the_same_tokens() -> None:
    lm = language_model(card=300)
    engines = [Engine(lm), Engine(lm, precision="bfloat16")]
    exact, rough = (
        engine.open(conditions(), prompt=None, length=40, sampling=GREEDY, generator=torch.Generator())
        for engine in engines
    )
    divergence: list[Tensor] = []
    while not exact.done:
        rough.columns.copy_(exact.columns)
        for engine in engines:
            engine.step()
        assert exact.logits is not None and rough.logits is not None
        p, q = exact.logits.log_softmax(-1), rough.logits.log_softmax(-1)
        divergence.append((p.exp() * (p - q)).sum(-1).mean())
    assert 0 < torch.stack(divergence).mean() < 0.02
