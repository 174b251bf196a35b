"""The decoder computes what audiocraft computes, with its weights and in its dtypes, or refuses the model."""

import pytest
import torch
from torch import nn

from benchmarks.random_models import conditions, language_model
from musicgen_svc.audiocraft_compat import LMModel
from musicgen_svc.engine.batch import DecodeRequest
from musicgen_svc.engine.engine import Engine
from musicgen_svc.engine.factory import BatchKind, batch_for
from musicgen_svc.engine.sampling_params import SamplingParams
from musicgen_svc.errors import WeightsError

CARD = 300


def twins(kind: str) -> tuple[LMModel, LMModel]:
    """A model with the dtypes that audiocraft uses on a GPU, and one with the same numbers in fp32."""
    mixed, exact = language_model(kind, card=300, dtype=torch.float16), language_model(kind, card=300)
    exact.load_state_dict({name: tensor.float() for name, tensor in mixed.state_dict().items()})
    return mixed, exact


@pytest.mark.parametrize("kind", ["text", "melody"])
@pytest.mark.parametrize("batch_kind", ["ragged", "static"])
def test_with_layers_in_fp16_the_logits_differ_from_fp32_by_rounding(
    kind: str, batch_kind: BatchKind
) -> None:
    """On a GPU audiocraft keeps embeddings, heads and the last norm in fp32, and has layers in fp16."""
    mixed, exact = twins(kind)
    types = {name: p.dtype for name, p in mixed.named_parameters()}
    assert types["emb.0.weight"] == types["linears.0.weight"] == types["out_norm.weight"] == torch.float32
    assert types["transformer.layers.0.linear1.weight"] == torch.float16

    given = conditions(kind)
    sampling, generator = SamplingParams(temperature=0), torch.Generator()
    tokens = Engine(batch_for(mixed, batch_kind=batch_kind)).generate(
        given, prompt=None, length=40, sampling=sampling, generator=generator
    )
    request = DecodeRequest(given, tokens[:, :39], 40, sampling, generator)
    logits = [batch_for(lm).open(request).logits for lm in (mixed, exact)]
    assert logits[0].dtype == torch.float16
    assert (logits[0].float() - logits[1]).abs().max() < 0.05 * logits[1].std()


def test_the_decoder_shares_the_weights_of_the_model() -> None:
    lm = language_model(card=CARD)
    own = {p.untyped_storage().data_ptr() for p in lm.parameters()}
    before = lm(torch.zeros(2, 4, 3, dtype=torch.long), [], conditions())
    decoder = batch_for(lm).decoder
    after = lm(torch.zeros(2, 4, 3, dtype=torch.long), [], conditions())
    assert torch.equal(before, after)
    heads = {linear.weight.untyped_storage().data_ptr() for linear in lm.linears}
    assert len(heads) == 1, "the output heads are views of one weight"
    batch_for(lm)
    assert heads == {linear.weight.untyped_storage().data_ptr() for linear in lm.linears}
    assert torch.equal(before, lm(torch.zeros(2, 4, 3, dtype=torch.long), [], conditions()))
    shared = {p.untyped_storage().data_ptr() for p in lm.parameters()} - heads
    assert shared <= own and decoder.weights.data_ptr() == lm.emb[0].weight.data_ptr()


def test_another_architecture_is_refused_and_its_property_is_named() -> None:
    lm = language_model(card=CARD)
    lm.transformer.positional_embedding = "rope"
    with pytest.raises(WeightsError, match="sinusoidal positions"):
        batch_for(lm)
    lm = language_model(card=CARD)
    lm.linears[0] = nn.Linear(64, CARD, bias=True)
    with pytest.raises(WeightsError, match="without biases"):
        batch_for(lm)
