"""Checks that each kernel gives the results of the plain operation of the same name.

`test_kernels.py` runs the checks on a GPU, if there is one, and on a CPU with Triton's interpreter. The
interpreter must be chosen in the environment before Triton is imported, so for it this file is run as a
program. It prints one line for each check: its name, and the failure or null.
"""

import json
import traceback
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from musicgen_svc.engine.operations import PLAIN, Attend, PlainOperations
from musicgen_svc.engine.sampling import SlotParameters

Check = Callable[[torch.device], None]


def noise(*size: int, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    torch.testing.assert_close(found.float(), expected.float(), atol=tolerance, rtol=tolerance)


# --- residual and norm --------------------------------------------------------------------------


def norm_of(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    from musicgen_svc.engine import kernels

    dim = shape[-1]
    x, delta = noise(*shape, device=device), noise(*shape, device=device, dtype=dtype, seed=1)
    weight, bias = noise(dim, device=device, seed=2), 3 + noise(dim, device=device, seed=3)
    before = x.clone()
    for added in (delta, None):
        total, normed = kernels.add_norm(x, added, weight, bias, 1e-5, dtype)
        expected_total, expected = PLAIN.add_norm(x, added, weight, bias, 1e-5, dtype)
        assert torch.equal(total, expected_total)
        close(normed, expected, 1e-5 if dtype == torch.float32 else 4e-3)
    assert torch.equal(x, before), "the stream was written to"


def norm_of_the_last_position(device: torch.device) -> None:
    """The rows are not contiguous."""
    from musicgen_svc.engine import kernels

    x, delta = noise(2, 5, 96, device=device), noise(2, 5, 96, device=device, seed=1)
    weight, bias = noise(2, 96, device=device, seed=2)
    found = kernels.add_norm(x[:, -1], delta[:, -1], weight, bias, 1e-5, torch.float32)
    expected = PLAIN.add_norm(x[:, -1], delta[:, -1], weight, bias, 1e-5, torch.float32)
    for a, b in zip(found, expected, strict=True):
        close(a, b, 1e-5)


# --- attention ----------------------------------------------------------------------------------


def attention_of(
    lengths: list[int], head: int, capacity: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Each row has its own cache, which is a part of a larger buffer, and stores its own key and value."""
    from musicgen_svc.engine import kernels

    rows, heads = len(lengths), 2
    packed = noise(rows, 1, 3, heads, head, device=device, dtype=dtype)  # the layout of the packed projection
    query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
    buffers = noise(2, 3, rows + 2, heads, capacity, head, device=device, dtype=dtype, seed=1)
    at = torch.tensor(lengths, device=device)
    results = []
    for operation in (kernels.attention, PLAIN.attention):
        keys, values = buffers.clone()[:, 1, :rows]
        # Numbers beyond the length must not change the result.
        beyond = torch.arange(capacity, device=device) >= at[:, None] - 1
        for cache in (keys, values):
            cache.masked_fill_(beyond[:, None, :, None], 1000)
        found = operation(at, capacity)(query, keys, values, (key, value))
        results.append((found, keys, values))
    (found, *stored), (expected, *expected_stored) = results
    close(found, expected, 1e-5 if dtype == torch.float32 else 2e-3)
    for a, b in zip(stored, expected_stored, strict=True):
        assert torch.equal(a, b), "another cell of the cache was written"


def shared_attention_of(lengths: list[int], capacity: int, device: torch.device) -> None:
    """Pairs of rows share a cache, which does not change. A row of length 0 gets exactly zero."""
    from musicgen_svc.engine import kernels

    rows, heads, head = len(lengths), 3, 16
    query = noise(rows, 1, heads, head, device=device).transpose(1, 2)
    buffers = noise(2, rows // 2 + 1, heads, capacity, head, device=device, seed=1)
    keys, values = buffers[:, : rows // 2]
    before = buffers.clone()
    at = torch.tensor(lengths, device=device)
    found = kernels.attention(at, capacity)(query, keys, values)
    close(found, PLAIN.attention(at, capacity)(query, keys, values), 1e-5)
    assert torch.equal(buffers, before)
    assert not found[at == 0].any() and found[at > 0].all()


def splits(device: torch.device) -> None:
    from musicgen_svc.engine.kernels import BLOCK, UNSPLIT, splits_of

    assert [splits_of(32, n) for n in (1, UNSPLIT, 1024, 2048, 4096)] == [1, 1, 8, 16, 32]
    assert [splits_of(rows * 32, 2048) for rows in (2, 8, 16, 32, 128)] == [16, 8, 4, 2, 1]
    assert all(
        extent // splits_of(n, extent) >= BLOCK for n in (1, 7, 100) for extent in range(513, 5000, 61)
    )


# --- sampling -----------------------------------------------------------------------------------

PARAMETERS = [
    # guidance, temperature, top_k, top_p
    (3.0, 1.0, 250, 0.0),
    (3.0, 0.0, 250, 0.0),
    (0.0, 0.7, 1, 0.0),
    (1.0, 1.3, 0, 0.9),
    (7.0, 1.0, 0, 0.0),
    (3.0, 1.0, 20, 0.3),
    (3.0, 1.0, 20, 1e-9),
    (3.0, 1.3, 10_000, 0.0),
]


def draws_of(card: int, dtype: torch.dtype, device: torch.device) -> None:
    from musicgen_svc.engine import kernels

    slots = len(PARAMETERS)
    logits = (
        (2 * noise(slots, 2, 2, card, device=device)).round().to(dtype)
    )  # rounded, so that many are equal
    parameters = SlotParameters(
        *(torch.tensor(p, device=device) for p in zip(*PARAMETERS, strict=True)),
        seed=torch.arange(slots, device=device) * 0x123456789ABCD,
        step=torch.tensor([1, 1500] * (slots // 2), device=device),
    )
    assert torch.equal(kernels.draw(logits, parameters), PLAIN.draw(logits, parameters))


def draws_from_views(device: torch.device) -> None:
    """Both rows are the same memory, and the parameters are views, as when a slot is opened."""
    from musicgen_svc.engine import kernels

    logits = noise(1, 2, 70, device=device).expand(2, -1, -1)[None]
    parameters = [torch.tensor([9.0, p], device=device)[1:] for p in (3.0, 1.0, 20.0, 0.0, 5.0, 7.0)]
    given = SlotParameters(*(p.long() if i in (2, 4, 5) else p for i, p in enumerate(parameters)))
    assert torch.equal(kernels.draw(logits, given), PLAIN.draw(logits, given))


# --- product ------------------------------------------------------------------------------------


def int8_product_of(shape: tuple[int, ...], outputs: int, dtype: torch.dtype, device: torch.device) -> None:
    """The rows are not contiguous. Numbers beyond the end of a row must not change the result."""
    from musicgen_svc.engine import kernels

    inputs = shape[-1]
    x = noise(*shape[:-1], inputs + 7, device=device, dtype=dtype)[..., :inputs]
    weight = (60 * noise(outputs, inputs, device=device, seed=1)).clamp(-127, 127).to(torch.int8)
    scales = noise(outputs, device=device, seed=2).abs() / 127
    found = kernels.int8_linear(x, weight, scales)
    exact = x.double() @ (weight.double() * scales.double()[:, None]).T
    assert (found.dtype, found.shape) == (dtype, exact.shape)
    assert (found - exact).abs().max() <= (1e-5 if dtype == torch.float32 else 1e-3) * exact.abs().max()
    close(found, PLAIN.int8_linear(x, weight, scales), 1e-4 if dtype == torch.float32 else 0.1)


# --- all of them --------------------------------------------------------------------------------


def a_static_batch(device: torch.device) -> None:
    """Requests that open and end at different steps get the tokens of the plain operations."""
    from benchmarks.random_models import conditions, language_model
    from musicgen_svc.engine.batch import DecodeRequest
    from musicgen_svc.engine.decoder import Decoder
    from musicgen_svc.engine.factory import operations_for
    from musicgen_svc.engine.sampling_params import SamplingParams
    from musicgen_svc.engine.state import Capacity
    from musicgen_svc.engine.static import StaticBatch

    lm = language_model(dim=16, layers=2, heads=1, card=40, delays=(0, 1), device=device)
    given = {name: (t.to(device), mask.to(device)) for name, (t, mask) in conditions(dim=16).items()}
    codes = []
    for kernels in ("on", "off"):
        decoder = Decoder(lm, operations=operations_for(lm, kernels))
        assert decoder.operations.reads_lengths == (kernels == "on")
        batch = StaticBatch(decoder, Capacity(2, 40, 640, 40), graphs="off")
        slots = []
        for i, own in enumerate((given, {})):
            sampling = SamplingParams(temperature=0 if i == 0 else 1, top_k=9)
            generator = torch.Generator().manual_seed(i)
            slots.append(batch.open(DecodeRequest(own, None, 3 + i, sampling, generator)))
            batch.step()
        while not all(slot.done for slot in slots):
            batch.step()
        codes.append([slot.codes for slot in slots])
    for ours, expected in zip(*codes, strict=True):
        assert torch.equal(ours, expected)


def the_self_test(device: torch.device) -> None:
    """The kernels pass the self-test at load, and wrong operations do not."""
    from musicgen_svc.engine.kernels import KERNELS
    from musicgen_svc.engine.selftest import Shape, disagreements

    shape = Shape(dim=32, heads=2, codebooks=2, card=70, dtype=torch.float16)
    assert disagreements(KERNELS, shape, device) == []

    class Wrong(PlainOperations):
        def add_norm(self, x, delta, weight, bias, eps, dtype):  # type: ignore[no-untyped-def]
            return super().add_norm(x, None, weight, bias, eps, dtype)

        def attention(self, lengths: Tensor, extent: int) -> Attend:
            return super().attention(lengths - 1, extent)

        def draw(self, logits: Tensor, parameters: SlotParameters) -> Tensor:
            return super().draw(logits, parameters._replace(guidance=parameters.guidance + 1))

        def int8_linear(self, x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
            return super().int8_linear(x, weight, scales.flip(0))

    assert len(disagreements(Wrong(), shape, device)) == 4


HALF, SINGLE = torch.float16, torch.float32
CHECKS: dict[str, Check] = {
    **{
        f"norm-{case}": partial(norm_of, *case)
        for case in (
            ((2, 1, 96), HALF), ((3, 2, 100), SINGLE), ((1, 1, 1536), HALF), ((2, 1, 2048), SINGLE)
        )
    },
    "norm-last": norm_of_the_last_position,
    **{
        f"attention-{case}": partial(attention_of, *case)
        for case in (
            ([1, 63], 16, 100, SINGLE),
            ([64, 65], 64, 512, HALF),
            ([127, 128, 129], 16, 300, SINGLE),
            ([300, 1, 1024], 16, 1024, SINGLE),
            ([300, 129, 128, 65], 64, 640, HALF),
            ([640, 300], 24, 640, SINGLE),
        )
    },
    **{
        f"shared-{case}": partial(shared_attention_of, *case)
        for case in (([5, 0, 64, 64], 64), ([0, 0, 130, 0], 200), ([700, 0], 768))
    },
    "splits": splits,
    **{f"draws-{case}": partial(draws_of, *case) for case in ((70, SINGLE), (128, HALF))},
    "draws-views": draws_from_views,
    **{
        f"int8-{case}": partial(int8_product_of, *case)
        for case in (
            ((2, 1, 96), 40, SINGLE), ((1, 1, 512), 96, HALF), ((32, 1, 300), 70, HALF),
            ((2, 40, 96), 32, HALF),
        )
    },
    "static": a_static_batch,
    "self-test": the_self_test,
}  # fmt: skip


def main() -> None:
    """Runs all checks on a CPU, and prints the name and the failure, or null, of each as JSON."""
    for name, check in CHECKS.items():
        try:
            check(torch.device("cpu"))
            failure = None
        except Exception:
            failure = traceback.format_exc()
        print(json.dumps([name, failure]), flush=True)


if __name__ == "__main__":
    main()
