"""The plain step attends to exactly the positions in use, in however many parts it reads the cache."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.random_models import language_model
from musicgen_svc.engine import plain_step
from musicgen_svc.engine.decoder import Decoder
from musicgen_svc.engine.plain_step import StaticAttention
from musicgen_svc.engine.state import ActiveExtent, Capacity, DeviceState

LENGTHS = (1, 255, 256, 257, 512, 700)


@pytest.mark.parametrize("extent", [768, 800, 1024])
def test_each_row_attends_to_what_it_has_used(extent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stands in the cache beyond it. 800 positions cannot be divided."""
    decoder = Decoder(language_model(dim=32, layers=2, heads=4, card=40))
    state = DeviceState(decoder, Capacity(len(LENGTHS), columns=700, positions=1024))
    noise = torch.Generator().manual_seed(0)
    for buffer in (state.keys, state.values):
        buffer.normal_(generator=noise)
    state.prefix_length.copy_(torch.tensor(LENGTHS) // 2)
    state.filled.copy_(torch.tensor(LENGTHS) - state.prefix_length)
    for row, length in enumerate(n for n in LENGTHS for _ in range(2)):
        state.keys[:, row, :, length - 1 :] = 1000
        state.values[:, row, :, length - 1 :] = -1000
    query, key, value = torch.randn(3, 2 * len(LENGTHS), 4, 1, 8, generator=noise)
    parts: list[int] = []
    attention_and_log_sums = plain_step._attention_and_log_sums

    def noted(query: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        parts.append(query.shape[1])
        return attention_and_log_sums(query, *rest)

    monkeypatch.setattr(plain_step, "_attention_and_log_sums", noted)
    found = StaticAttention(state, ActiveExtent(len(LENGTHS), extent, 64)).attend(1, query, key, value)
    assert parts == ([] if extent == 800 else [extent // 256])
    for row, length in enumerate(n for n in LENGTHS for _ in range(2)):
        used = slice(row, row + 1), slice(None), slice(length)
        assert torch.equal(state.keys[1][used][0, :, -1], key[row, :, 0]), "it is stored"
        expected = F.scaled_dot_product_attention(
            query[row][None], state.keys[1][used], state.values[1][used]
        )
        torch.testing.assert_close(found[row][None], expected, atol=1e-5, rtol=1e-5)
