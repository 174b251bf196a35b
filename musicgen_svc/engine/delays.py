"""Codebooks side by side in time -> the delayed columns that the language model reads, and back.

The released models delay codebook k by `delays[k]` columns behind one column of special tokens:
0, 1, 2, 3 in mono, 0, 0, 1, 1, 2, 2, 3, 3 in stereo. With 4 frames (S: special):

    S 0 1 2 3 S S S
    S S 0 1 2 3 S S
    S S S 0 1 2 3 S
    S S S S 0 1 2 3

Pure: knows tensors and delays, no model.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def num_columns(frames: int, delays: Sequence[int]) -> int:
    """How many columns hold `frames` frames: 1,504 for the 1,500 frames of 30 s in mono."""
    return 1 + frames + max(delays)


def first_column(frame: int) -> int:
    """The first column that holds a token of `frame`: that of the codebooks without a delay."""
    return 1 + frame


def interleave(codes: Tensor, delays: Sequence[int], special: int) -> Tensor:
    """[..., K, T] codes -> [..., K, S] columns; `special` where no code belongs."""
    *_, codebooks, frames = codes.shape
    assert codebooks == len(delays) and min(delays) == 0, (codes.shape, delays)
    columns = codes.new_full((*codes.shape[:-1], num_columns(frames, delays)), special)
    for k, delay in enumerate(delays):
        columns[..., k, 1 + delay : 1 + delay + frames] = codes[..., k, :]
    return columns


def deinterleave(columns: Tensor, delays: Sequence[int]) -> Tensor:
    """[..., K, S] columns -> [..., K, T] codes: the inverse of `interleave`."""
    frames = columns.shape[-1] - num_columns(0, delays)
    assert columns.shape[-2] == len(delays) and frames >= 0, (columns.shape, delays)
    return torch.stack(
        [columns[..., k, 1 + delay : 1 + delay + frames] for k, delay in enumerate(delays)], dim=-2
    )
