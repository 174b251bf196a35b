"""The delayed columns are those of audiocraft's pattern, and can be converted back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.random_models import MONO, STEREO
from musicgen_svc.audiocraft_compat import DelayedPatternProvider
from musicgen_svc.engine.delays import deinterleave, first_column, interleave, num_columns

SPECIAL = 99
DELAYS = st.lists(st.integers(0, 5), min_size=1, max_size=8).map(lambda d: tuple([0, *sorted(d)]))


def _codes(codebooks: int, frames: int) -> torch.Tensor:
    return torch.arange(codebooks * frames).view(codebooks, frames) % SPECIAL


@pytest.mark.parametrize("delays", [MONO, STEREO])
@pytest.mark.parametrize("frames", [1, 3, 50])
def test_columns_are_those_of_audiocrafts_pattern(delays: tuple[int, ...], frames: int) -> None:
    pattern = DelayedPatternProvider(len(delays), list(delays)).get_pattern(frames)
    codes = _codes(len(delays), frames)
    columns, _, _ = pattern.build_pattern_sequence(codes[None], SPECIAL)
    assert torch.equal(interleave(codes, delays, SPECIAL), columns[0])
    reverted, _, _ = pattern.revert_pattern_sequence(columns, special_token=-1)
    assert torch.equal(deinterleave(columns[0], delays), reverted[0, :, :frames])
    for frame in range(frames):
        assert first_column(frame) == pattern.get_first_step_with_timesteps(frame)


def test_thirty_seconds_are_1504_columns() -> None:
    assert num_columns(1500, MONO) == num_columns(1500, STEREO) == 1504


@settings(deadline=None)
@given(delays=DELAYS, frames=st.integers(0, 20), batch=st.integers(1, 3))
def test_deinterleave_inverts_interleave(delays: tuple[int, ...], frames: int, batch: int) -> None:
    codes = torch.stack([_codes(len(delays), frames) + b for b in range(batch)])
    columns = interleave(codes, delays, SPECIAL + batch)
    assert columns.shape == (batch, len(delays), num_columns(frames, delays))
    assert torch.equal(deinterleave(columns, delays), codes)
    assert (columns == SPECIAL + batch).sum() == columns.numel() - codes.numel()
