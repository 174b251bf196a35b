"""Tokens are drawn as audiocraft draws them, and only from the allowed set."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from musicgen_svc import audiocraft_compat as compat  # noqa: F401
from musicgen_svc.engine.sampling import (
    SlotParameters,
    counted_uniform,
    draw,
    draw_counted,
    keep_top_k,
    keep_top_p,
    mix,
)
from musicgen_svc.engine.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0)
PARAMS = st.builds(
    SamplingParams,
    top_k=st.sampled_from([0, 1, 2, 5, 30, 1000]),
    top_p=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
)


def _logits(codebooks: int = 4, card: int = 30, seed: int = 0, ties: bool = False) -> Tensor:
    logits = torch.randn(codebooks, card, generator=torch.Generator().manual_seed(seed)) * 2
    return logits.round() if ties else logits


def _counted(logits: Tensor, params: SamplingParams, seed: int, step: int = 0) -> Tensor:
    batch = len(logits)
    numbers = (params.guidance, float(params.temperature), params.top_k, params.top_p, seed, step)
    return draw_counted(logits, SlotParameters(*(torch.full((batch,), number) for number in numbers)))


def _allowed(logits: Tensor, params: SamplingParams) -> Tensor:
    """Computes which tokens [K, card] may be drawn by the definitions, token by token."""
    allowed = torch.zeros_like(logits, dtype=torch.bool)
    for k, row in enumerate(logits):
        if params.temperature == 0:
            allowed[k, row.argmax()] = True
            continue
        probabilities = torch.softmax(row / params.temperature, dim=-1)
        if params.top_p > 0:
            held = 0.0
            for token in probabilities.argsort(descending=True):
                if held > params.top_p + 1e-6:
                    break
                held += float(probabilities[token])
                allowed[k] |= (
                    probabilities == probabilities[token]
                )  # equally likely tokens may be in any order
        elif params.top_k > 0:
            kth = probabilities.sort(descending=True).values[min(params.top_k, len(row)) - 1]
            allowed[k] = probabilities >= kth
        else:
            allowed[k] = True
    return allowed


@pytest.mark.parametrize("temperature", [1e-40, 1e-6, 0.009])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_temperature_close_to_zero_is_greedy_and_does_not_overflow(
    temperature: float, dtype: torch.dtype
) -> None:
    logits = (100 * _logits(seed=1)).to(dtype)
    params = SamplingParams(temperature=temperature)
    assert torch.equal(draw(logits, params, torch.Generator()), logits.argmax(-1))
    assert torch.equal(_counted(logits[None], params, seed=1, step=1)[0], logits.argmax(-1))


@pytest.mark.parametrize(
    "params", [SamplingParams(top_k=7), SamplingParams(top_k=0), SamplingParams(top_p=0.8)]
)
def test_a_seed_draws_what_audiocraft_draws(params: SamplingParams) -> None:
    from audiocraft.utils import utils

    for seed in range(20):
        logits = _logits(seed=seed, ties=seed % 2 == 0)
        probabilities = torch.softmax(logits[None] / params.temperature, dim=-1)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            if params.top_p:
                expected = utils.sample_top_p(probabilities, p=params.top_p)
            elif params.top_k:
                expected = utils.sample_top_k(probabilities, k=params.top_k)
            else:
                expected = utils.multinomial(probabilities, num_samples=1)
        assert torch.equal(draw(logits, params, torch.Generator().manual_seed(seed)), expected[0, :, 0])


@settings(deadline=None, max_examples=60)
@given(params=PARAMS, seed=st.integers(0, 2**32 - 1), ties=st.booleans())
def test_only_allowed_tokens_are_drawn(params: SamplingParams, seed: int, ties: bool) -> None:
    logits = _logits(seed=seed % 1000, ties=ties)
    allowed = _allowed(logits, params)
    rows = torch.arange(len(logits))
    assert allowed[rows, draw(logits, params, torch.Generator().manual_seed(seed))].all()
    for token in _counted(logits.expand(3, -1, -1), params, seed):
        assert allowed[rows, token].all()


def test_a_greedy_choice_is_the_first_most_likely_token_and_draws_no_number() -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0, 0.0]])
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert draw(logits, GREEDY, generator).tolist() == [1]
    assert torch.equal(generator.get_state(), before)
    assert _counted(logits[None], GREEDY, seed=0).tolist() == [[1]]


def test_top_k_keeps_ties_and_sums_to_one() -> None:
    kept = keep_top_k(torch.tensor([[0.4, 0.2, 0.2, 0.1, 0.1]]), 2)
    assert torch.allclose(kept, torch.tensor([[0.5, 0.25, 0.25, 0.0, 0.0]]))


def test_top_p_keeps_the_token_that_crosses_p() -> None:
    kept = keep_top_p(torch.tensor([[0.5, 0.25, 0.125, 0.125]]), 0.6)
    assert torch.allclose(kept, torch.tensor([[2 / 3, 1 / 3, 0.0, 0.0]]))


@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.0])
def test_guidance_extrapolates_from_the_null_row(guidance: float) -> None:
    conditional, null = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 1.0])
    assert mix(conditional, null, guidance).tolist() == [1 + guidance, 1 - guidance]


def test_counted_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    draws = 20_000
    parameters = SlotParameters(
        guidance=torch.ones(draws),
        temperature=torch.ones(draws),
        top_k=torch.zeros(draws, dtype=torch.long),
        top_p=torch.zeros(draws),
        seed=torch.full((draws,), 7),
        step=torch.arange(draws),
    )
    tokens = draw_counted(logits.expand(draws, 1, 4), parameters)
    shares = tokens.flatten().bincount(minlength=4) / draws
    assert torch.allclose(shares, torch.softmax(logits[0], dim=-1), atol=0.015)


def test_counted_draws_depend_on_seed_and_step_only() -> None:
    seed, step = torch.tensor([5, 6, 5, 5 + 2**32]), torch.tensor([1, 1, 2, 1])
    numbers = counted_uniform(seed, step, 2, 512)
    assert torch.equal(counted_uniform(seed[2:3], step[2:3], 2, 512)[0], numbers[2])
    assert numbers.min() > 0 and numbers.max() < 1
    for a in range(4):
        for b in range(a):
            assert abs(torch.corrcoef(torch.stack([numbers[a].flatten(), numbers[b].flatten()]))[0, 1]) < 0.12
