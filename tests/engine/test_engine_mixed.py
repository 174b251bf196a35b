"""On a GPU audiocraft keeps embeddings, heads and the last norm in fp32 and makes the layers fp16."""

import pytest
import torch

from benchmarks.random_models import conditions, language_model
from musicgen_svc.audiocraft_compat import LMModel
from musicgen_svc.engine.batch import DecodeRequest
from musicgen_svc.engine.engine import Engine
from musicgen_svc.engine.factory import BatchKind, batch_for
from musicgen_svc.engine.sampling_params import SamplingParams


def twins(kind: str) -> tuple[LMModel, LMModel]:
    """The mix of a GPU, and the same numbers in fp32."""
    mixed, exact = language_model(kind, card=300, dtype=torch.float16), language_model(kind, card=300)
    exact.load_state_dict({name: tensor.float() for name, tensor in mixed.state_dict().items()})
    return mixed, exact


@pytest.mark.parametrize("kind", ["text", "melody"])
@pytest.mark.parametrize("batch_kind", ["ragged", "static"])
def test_the_mix_gives_fp32s_logits_within_fp16s_rounding(kind: str, batch_kind: BatchKind) -> None:
    mixed, exact = twins(kind)
    types = {name: p.dtype for name, p in mixed.named_parameters()}
    assert types["emb.0.weight"] == types["linears.0.weight"] == types["out_norm.weight"] == torch.float32
    assert types["transformer.layers.0.linear1.weight"] == torch.float16

    given = conditions(kind)
    sampling, generator = SamplingParams(temperature=0), torch.Generator()
    tokens = Engine(batch_for(mixed, kind=batch_kind)).generate(
        given, prompt=None, length=40, sampling=sampling, generator=generator
    )
    request = DecodeRequest(given, tokens[:, :39], 40, sampling, generator)
    logits = [batch_for(lm).open(request).logits for lm in (mixed, exact)]
    assert logits[0].dtype == torch.float16
    assert (logits[0].float() - logits[1]).abs().max() < 0.05 * logits[1].std()
