"""Converts the codes of all codebooks to the delayed columns that the language model reads, and back.

The first column has special tokens only. Then codebook k is delayed by `delays[k]` columns: 0, 1, 2, 3 in
the released mono models, 0, 0, 1, 1, 2, 2, 3, 3 in the stereo ones. With 4 frames in mono (S is the special
token):

    S 0 1 2 3 S S S
    S S 0 1 2 3 S S
    S S S 0 1 2 3 S
    S S S S 0 1 2 3

The pattern is that of "Simple and Controllable Music Generation" (Copet et al., 2023). These functions know
no model.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def num_columns(frames: int, delays: Sequence[int]) -> int:
    """Returns how many columns hold `frames` frames: 1,504 for the 1,500 frames of 30 s."""
    return 1 + frames + max(delays)


def first_column(frame: int) -> int:
    """Returns the first column that has a token of `frame`: that of a codebook without a delay."""
    return 1 + frame


def interleave(codes: Tensor, delays: Sequence[int], special: int) -> Tensor:
    """Converts codes [..., K, T] to columns [..., K, S], with `special` in every cell that has no code."""
    *_, codebooks, frames = codes.shape
    assert codebooks == len(delays) and min(delays) == 0, (codes.shape, delays)
    columns = codes.new_full((*codes.shape[:-1], num_columns(frames, delays)), special)
    for k, delay in enumerate(delays):
        columns[..., k, 1 + delay : 1 + delay + frames] = codes[..., k, :]
    return columns


def deinterleave(columns: Tensor, delays: Sequence[int]) -> Tensor:
    """Converts columns [..., K, S] to codes [..., K, T]. It is the inverse of `interleave`."""
    frames = columns.shape[-1] - num_columns(0, delays)
    assert columns.shape[-2] == len(delays) and frames >= 0, (columns.shape, delays)
    return torch.stack(
        [columns[..., k, 1 + delay : 1 + delay + frames] for k, delay in enumerate(delays)], dim=-2
    )
