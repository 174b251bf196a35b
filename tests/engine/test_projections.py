"""Projections are products by their weights, in each precision within its rounding."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.random_models import audiocraft_generates, conditions, language_model
from benchmarks.workload import stored_in_float16
from musicgen_svc.engine.batch import DecodeRequest
from musicgen_svc.engine.decoder import Decoder
from musicgen_svc.engine.engine import Engine
from musicgen_svc.engine.factory import batch_for
from musicgen_svc.engine.projections import Precision, merged, projection
from musicgen_svc.engine.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0)
FBGEMM = torch.backends.quantized.engine in ("x86", "fbgemm")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [1, 2, 8, 33])
@pytest.mark.parametrize(
    ("precision", "tolerance"), [("reference", 1e-5), ("float16", 1e-3), ("bfloat16", 2e-2), ("int8", 3e-2)]
)
def test_a_projection_is_the_product(rows: int, precision: Precision, tolerance: float) -> None:
    x, weight = drawn(rows, 1, 96, seed=rows), drawn(64, 96)
    exact = (x.double() @ weight.double().T).float()
    product = projection(weight, precision)(x)
    assert product.dtype == x.dtype and product.shape == exact.shape
    assert (product - exact).abs().max() <= tolerance * exact.abs().max()
    if precision != "reference":
        assert not torch.equal(product, exact), "nothing was rounded"


def test_a_decoder_tells_whether_requests_change_each_others_bits() -> None:
    """Those of a checkpoint in float16 do not, if FBGEMM packs its matrices; products in fp32 may."""
    assert not Decoder(language_model()).rows_are_independent
    with torch.no_grad():
        stored = stored_in_float16(language_model())
    assert Decoder(stored).rows_are_independent == FBGEMM
    assert not Decoder(language_model(), "bfloat16").rows_are_independent


def test_a_slice_of_a_weight_is_the_slice_of_the_product() -> None:
    x, weight = torch.randn(2, 32), torch.randn(96, 32)
    for precision in get_args(Precision):
        whole = projection(weight, precision)(x)
        torch.testing.assert_close(projection(weight[:32], precision)(x), whole[:, :32])


def test_float16_multiplies_in_fp32_by_weights_that_are_rounded() -> None:
    x, weight = drawn(2, 96), drawn(64, 96)
    expected = x.double() @ weight.half().double().T
    torch.testing.assert_close(
        projection(weight, "float16")(x), expected.float(), rtol=1e-5, atol=1e-5
    )  # fp16 activations or sums would be off by 1e-3


@pytest.mark.skipif(not FBGEMM, reason="other kernels add in another order")
@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_a_row_of_a_product_does_not_depend_on_the_others(precision: Precision) -> None:
    multiply, x = projection(drawn(256, 192), precision), drawn(16, 192)
    assert multiply.row_wise and multiply.matrix is None
    x[5] *= 1000
    together = multiply(x)
    for rows in ([0], [3, 4], [0, 1, 2, 3, 4], [5, 7, 9]):
        assert torch.equal(multiply(x[rows]), together[rows])


def rounded_to_steps(x: Tensor, dim: int, steps: int) -> Tensor:
    """Rounds to multiples of the largest number along a dimension, divided by `steps`."""
    scale = x.abs().amax(dim, keepdim=True) / steps
    return (x / scale).round() * scale


@pytest.mark.skipif(not FBGEMM, reason="only FBGEMM rounds the input")
def test_int8_rounds_the_input_by_row_and_the_weight_by_output_channel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, weight = drawn(3, 96, seed=1) * torch.tensor([[1e-3], [1.0], [1e3]]), drawn(64, 96) ** 3
    for vnni, steps in ((torch.cpu._is_vnni_supported(), None), (False, 63)):
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda supported=vnni: supported)
        steps = steps or (127 if vnni else 63)
        expected = rounded_to_steps(x.double(), 1, steps) @ rounded_to_steps(weight.double(), 1, 127).T
        product = projection(weight, "int8")(x)
        error = (product - expected).abs().amax(1) / expected.abs().amax(1)
        assert error.max() < 2e-3, "a few numbers may round to the next step"


def test_int8_without_fbgemm_rounds_the_weight_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("musicgen_svc.engine.projections.uses_fbgemm", lambda weight: False)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 1e-2)):  # as on a CPU, as on a GPU
        x, weight = drawn(3, 96).to(dtype), drawn(64, 96).to(dtype)
        expected = x.double() @ rounded_to_steps(weight.double(), 1, 127).T
        product = projection(weight, "int8")(x)
        assert product.dtype == dtype
        assert (product - expected).abs().max() < tolerance * expected.abs().max()


def test_the_matrix_of_a_product_is_what_it_multiplies_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("musicgen_svc.engine.projections.uses_fbgemm", lambda weight: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    x, weight = drawn(2, 96), drawn(64, 96)
    for precision in get_args(Precision):
        product = projection(weight, precision)
        assert product.matrix is not None
        whole = product.matrix.weight.float()
        if product.matrix.scales is not None:
            assert product.matrix.weight.dtype == torch.int8 and product.matrix.scales.dtype == torch.float32
            whole = whole * product.matrix.scales[:, None]
        tolerance = 0.02 if precision == "bfloat16" else 1e-5
        torch.testing.assert_close(product(x), x @ whole.T, rtol=tolerance, atol=tolerance)
    assert (projection(weight, "reference").matrix or (None,))[0] is weight, "it is not copied"


def test_merged_weights_are_one_tensor_of_which_the_parameters_are_views() -> None:
    parameters = [torch.nn.Parameter(drawn(3, 8), requires_grad=False) for _ in range(4)]
    expected = torch.cat([parameter.clone() for parameter in parameters])
    whole = merged(parameters)
    assert torch.equal(whole, expected)
    parameters[2].fill_(7)
    assert (whole[6:9] == 7).all()
    assert merged(parameters).data_ptr() == whole.data_ptr(), "they are merged already"


def test_float16_without_fbgemm_is_the_same_product(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = drawn(2, 96), drawn(64, 96)
    expected = projection(weight, "float16")(x)
    monkeypatch.setattr("musicgen_svc.engine.projections.uses_fbgemm", lambda weight: False)
    for own in (weight, weight.half().float()):  # one is rounded now, the other already was
        torch.testing.assert_close(projection(own, "float16")(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", get_args(Precision))
def test_products_of_half_precision_are_in_half_precision(precision: Precision) -> None:
    x, weight = drawn(2, 96).half(), drawn(64, 96).half()
    product = projection(weight, precision)(x)
    assert product.dtype == torch.float16
    torch.testing.assert_close(product, x @ weight.T, rtol=5e-2, atol=0.3)


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_zeros_give_exact_zeros(precision: Precision) -> None:
    assert not projection(drawn(64, 96), precision)(torch.zeros(2, 96)).any()
    assert not projection(torch.zeros(64, 96), precision)(drawn(2, 96)).any()


@pytest.mark.skipif(not FBGEMM, reason="only FBGEMM packs weights")
def test_the_reference_packs_a_matrix_that_fits_float16_and_shares_any_other() -> None:
    exact, x = drawn(150, 96), drawn(2, 96)
    stored = exact.half().float()
    nearly = stored.clone()
    nearly[-1, -1] = 1 / 3
    for weight, packed in ((exact, False), (stored, True), (nearly, False)):
        product = projection(weight, "reference")
        before = product(x)
        torch.testing.assert_close(before, F.linear(x, weight), rtol=1e-5, atol=1e-5)
        weight.zero_()
        assert torch.equal(product(x), before) is packed


@contextmanager
def dropped_after_loading(part: nn.Module) -> Iterator[None]:
    """A `WeightsLoader` after which the module has no weights."""
    yield
    for parameter in part.parameters():
        parameter.data = torch.empty(0)


@pytest.mark.parametrize("kind", ["text", "melody"])
@pytest.mark.parametrize("precision", ["reference", "float16"])
def test_weights_that_are_stored_in_float16_give_audiocrafts_tokens_from_packed_copies(
    kind: str, precision: Precision
) -> None:
    lm = stored_in_float16(language_model(kind, card=300))
    given, sampling = conditions(kind, chroma=13), SamplingParams()
    expected = audiocraft_generates(lm, given, prompt=None, length=150, sampling=sampling, seed=3)
    engine = Engine(batch_for(lm, precision=precision, load_weights=dropped_after_loading))
    assert not any(p.numel() for part in (*lm.transformer.layers, lm.linears) for p in part.parameters())
    generator = torch.Generator().manual_seed(3)
    tokens = engine.generate(given, prompt=None, length=150, sampling=sampling, generator=generator)
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("kind", ["text", "melody"])
def test_weights_that_are_not_packed_are_kept_when_the_model_drops_them(kind: str) -> None:
    lm, given, sampling = language_model(kind, card=300), conditions(kind, chroma=13), SamplingParams()
    expected = audiocraft_generates(lm, given, prompt=None, length=40, sampling=sampling, seed=3)
    engine = Engine(batch_for(lm, load_weights=dropped_after_loading))
    generator = torch.Generator().manual_seed(3)
    tokens = engine.generate(given, prompt=None, length=40, sampling=sampling, generator=generator)
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize(("precision", "most"), [("float16", 5e-4), ("bfloat16", 0.02), ("int8", 0.02)])
@torch.inference_mode()
def test_a_faster_precision_stays_close_to_the_reference_on_the_same_tokens(
    precision: Precision, most: float
) -> None:
    lm = language_model(card=300)
    batches = [batch_for(lm), batch_for(lm, precision=precision)]
    exact, rough = (
        batch.open(DecodeRequest(conditions(), None, 40, GREEDY, torch.Generator())) for batch in batches
    )
    divergence: list[Tensor] = []
    while not exact.done:
        rough.columns.copy_(exact.columns)
        for batch in batches:
            batch.step()
        p, q = exact.logits.log_softmax(-1), rough.logits.log_softmax(-1)
        divergence.append((p.exp() * (p - q)).sum(-1).mean())
    assert 0 < torch.stack(divergence).mean() < most
