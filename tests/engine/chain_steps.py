"""Checks that whole steps of a chain give what plain steps give. `chain_checks.py` runs them."""

import importlib.util
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.random_models import MODELS, Conditions, conditions, language_model
from musicgen_svc.engine.batch import UNKNOWN, DecodeRequest
from musicgen_svc.engine.chain import attention, embedding, product, sampling
from musicgen_svc.engine.chain.chain import Chain
from musicgen_svc.engine.decoder import Decoder
from musicgen_svc.engine.plain_step import PlainStep
from musicgen_svc.engine.sampling_params import SamplingParams
from musicgen_svc.engine.selftest import disagreements
from musicgen_svc.engine.state import ActiveExtent, Capacity, DeviceState, Step
from musicgen_svc.engine.static import StaticBatch

LENGTHS, TEXT = (1, 64, 65, 130, 260), 70
CARD = 40


def decoder_of(name: str, device: torch.device, **shape: Any) -> Decoder:
    """A decoder of a tiny model of a kind. Its layers are in fp16 unless `shape` says otherwise."""
    kind, delays = MODELS[name]
    given = {"dim": 64, "heads": 2, "layers": 1, "card": CARD, "dtype": torch.float16} | shape
    return Decoder(language_model(kind, delays=delays, **given).to(device))


# --- tokens -------------------------------------------------------------------------------------


def tokens_of(device: torch.device, name: str) -> None:
    """Requests that open and end at different steps get the tokens of plain steps.

    One has no condition, and one has the guidance 0. In fp32, in which sums in another order do not change a
    token.
    """
    decoder = decoder_of(name, device, dtype=torch.float32, dim=32, layers=2 if name == "text" else 1)
    chain, plain = (tokens(decoder, step) for step in (Chain(decoder, 4), PlainStep(decoder)))
    for ours, expected in zip(chain, plain, strict=True):
        assert torch.equal(ours, expected)
    assert torch.cat(chain, dim=1).unique().numel() > 10, "a model that repeats itself proves nothing"


def tokens(decoder: Decoder, step: Step) -> list[Tensor]:
    """The tokens of some requests, of which each opens one step after another."""
    kind = "text" if decoder.has_text else "melody"
    batch = StaticBatch(decoder, step, Capacity(4, 40, 330, 80), graphs=False)
    requests: list[tuple[Conditions, SamplingParams, int]] = [
        (given_for(decoder, kind, tokens=5), SamplingParams(top_k=9), 4),
        ({}, SamplingParams(temperature=0), 2),
        (given_for(decoder, kind, tokens=70), SamplingParams(guidance=0, top_p=0.8), 3),
        (given_for(decoder, kind, tokens=64), SamplingParams(temperature=1.3, guidance=7), 3),
    ]
    slots = []
    for seed, (given, how, length) in enumerate(requests):
        generator = torch.Generator().manual_seed(seed)
        slots.append(batch.open(DecodeRequest(given, None, length, how, generator)))
        batch.step()
    while not all(slot.done for slot in slots):
        batch.step()
    return [slot.codes for slot in slots]


def given_for(decoder: Decoder, kind: str, *, tokens: int) -> Conditions:
    given = conditions(kind, dim=decoder.dim, seed=tokens, tokens=tokens, chroma=235)
    return {
        name: (tensor.to(decoder.device), mask.to(decoder.device)) for name, (tensor, mask) in given.items()
    }


# --- bits ---------------------------------------------------------------------------------------


def state_with(decoder: Decoder, requests: list[int]) -> DeviceState:
    """A state in which each slot has a request whose number decides all that a step reads of it."""
    state = DeviceState(decoder, Capacity(len(requests), columns=9, positions=max(LENGTHS), text=TEXT))
    for slot, request in enumerate(requests):
        source = torch.Generator().manual_seed(request)
        rows = slice(2 * slot, 2 * slot + 2)
        for cache, own in (
            (state.keys, rows), (state.values, rows), (state.text_keys, slice(slot, slot + 1)),
            (state.text_values, slice(slot, slot + 1)),
        ):  # fmt: skip
            if cache is not None:
                cache[:, own] = torch.randn(cache[:, own].shape, generator=source).to(cache)
        columns = torch.randint(decoder.card, state.columns.shape[1:], generator=source)
        length = LENGTHS[request % len(LENGTHS)]
        filled = min(length, 1 + request % 8)
        columns[:, filled:] = UNKNOWN
        state.columns[slot] = columns.to(decoder.device)
        state.filled[slot], state.prefix_length[slot], state.end[slot] = filled, length - filled, 9
        state.text_length[2 * slot] = (request * 23) % (TEXT + 1) if decoder.has_text else 0
    return state


def logits_of(decoder: Decoder, requests: list[int]) -> Tensor:
    """The logits of a step of these requests [slots, 2, K, card]."""
    extent = ActiveExtent(len(requests), max(LENGTHS), TEXT)
    return Chain(decoder, len(requests)).logits(state_with(decoder, requests), extent).clone()


def bits_of(device: torch.device, name: str) -> None:
    """In the same number of slots, a request's logits depend neither on its slot nor on other requests."""
    decoder = decoder_of(name, device)
    for slots in (2, 8):  # with 8 slots, norms have launches of their own
        expected = logits_of(decoder, list(range(slots)))
        turned = logits_of(decoder, [3, *range(30, 30 + slots - 2), 1])
        assert torch.equal(turned[-1], expected[1]), f"{slots} slots"
        if slots > 3:
            assert torch.equal(turned[0], expected[3]), f"{slots} slots"


def buckets_of(device: torch.device, name: str) -> None:
    """In another number of slots a request's logits differ by rounding only, as those of plain steps do."""
    decoder = decoder_of(name, device)
    request = 3
    alone = logits_of(decoder, [request])[0].float()
    plain = PlainStep(decoder).logits(state_with(decoder, [request]), ActiveExtent(1, max(LENGTHS), TEXT))
    for slots in (2, 4, 8, 16):
        found = logits_of(decoder, [*range(10, 9 + slots), request])[-1].float()
        for other in (alone, plain[0].float()):
            assert (found - other).norm() <= 2e-3 * other.norm(), slots


def null_rows_of(device: torch.device) -> None:
    """The null row of a text model has the logits of a plain step, which computes its cross-attention.

    They do not depend on the text.
    """
    decoder = decoder_of("text", device)
    state = state_with(decoder, [3, 4])
    extent = ActiveExtent(2, max(LENGTHS), TEXT)
    plain = PlainStep(decoder).logits(state, extent)[:, 1].float()
    null = Chain(decoder, 2).logits(state, extent)[:, 1].clone()
    assert (null.float() - plain).norm() <= 2e-3 * plain.norm()
    assert state.text_keys is not None and state.text_values is not None
    state.text_values.neg_()
    changed = Chain(decoder, 2).logits(state, extent)
    assert torch.equal(changed[:, 1], null) and state.text_length.any()


# --- the self-test ------------------------------------------------------------------------------

DAMAGES: list[tuple[ModuleType, str, str, str]] = [
    # module, kernel, a text of it and what replaces it
    (embedding, "embed", "* CODEBOOKS * column_stride + last", "* CODEBOOKS * column_stride"),
    (embedding, "embed", "position * DIM", "(position - 1) * DIM"),
    (product, "product", " * gain[None, :] + shift[None, :]", " * gain[None, :]"),
    (product, "product", "0.7071067811865476", "1.0"),
    (product, "product", "before + value.to(tl.float32)", "value.to(tl.float32)"),
    (product, "product", "tl.exp(high - tl.max(high, axis=2)[:, :, None])", "1.0 + 0 * high"),
    (attention, "attend", "following = position + TILE", "following = position"),
    (attention, "attend", "past = length - 1", "past = length"),
    (attention, "attend", "tl.store(values + last, new_value, mask=stores)", "pass"),
    (attention, "attend", "text_length + 2 * row).to(tl.int32)", "text_length + 2 * row).to(tl.int32) - 9"),
    (sampling, "soften", "difference * tl.load(guidance + slot)", "difference"),
    (sampling, "order", "(ROW - token)", "token"),
    (sampling, "draw", "word ^ (key >> 32).to(tl.uint32)", "word"),
    (sampling, "draw", "tl.store(filled + slot, own_column + 1, mask=running & (codebook == 0))", "pass"),
]  # fmt: skip


def altered(module: ModuleType, folder: Path, *replacements: tuple[str, str]) -> Any:
    """A copy of a module of kernels, in which texts are replaced by others."""
    assert module.__file__
    text = Path(module.__file__).read_text()
    for before, after in replacements:
        assert text.count(before) == 1, f"{text.count(before)} times: {before}"
        text = text.replace(before, after)
    file = folder / "altered.py"
    file.write_text(text)
    spec = importlib.util.spec_from_file_location("altered", file)
    assert spec and spec.loader
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@contextmanager
def damaged(module: ModuleType, kernel: str, before: str, after: str) -> Iterator[None]:
    """Context manager in which a kernel is launched that has a fault."""
    sound = getattr(module, kernel)
    with tempfile.TemporaryDirectory() as folder:
        setattr(module, kernel, getattr(altered(module, Path(folder), (before, after)), kernel))
        try:
            yield
        finally:
            setattr(module, kernel, sound)


def the_self_test(device: torch.device) -> None:
    """A chain passes the self-test at load, and a chain with a damaged kernel does not."""
    decoder = decoder_of("text", device, dim=32)
    chain, plain = Chain(decoder, 1), PlainStep(decoder)
    assert disagreements(chain, plain, decoder) == []
    missed = []
    for damage in DAMAGES:
        with damaged(*damage):
            if not disagreements(chain, plain, decoder):
                missed.append(damage[1:])
    assert not missed, missed
    assert disagreements(chain, plain, decoder) == []
