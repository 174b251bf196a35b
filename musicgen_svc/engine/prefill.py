"""The first pass of a request: lays out its columns, reads its prefix and prompt at once, gives the first
logits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from musicgen_svc.engine.batch import UNKNOWN, DecodeRequest
from musicgen_svc.engine.decoder import Conditions, Decoder
from musicgen_svc.engine.delays import first_column, interleave
from musicgen_svc.engine.kv_cache import RaggedAttention, RequestCache
from musicgen_svc.runtime.ticks import Check


@dataclass(frozen=True, eq=False)
class Prefilled:
    """A request up to its first draw."""

    columns: Tensor  # [K, S], delayed; UNKNOWN where a token is to be drawn
    start: int  # the first column that is drawn
    cache: RequestCache  # of its prefix and columns [0, start)
    logits: Tensor  # [rows, K, card] of column `start`


def prefill(decoder: Decoder, request: DecodeRequest, *, spare: bool, check: Check) -> Prefilled:
    """Runs the first pass. `spare`: the cache also has room for all that will be drawn."""
    columns, start = lay_out(decoder, request)
    prefix, text = decoder.fuse(request.conditions)
    rows = rows_that_matter(request.conditions, request.sampling.guidance)
    new = prefix.shape[1] + start
    to_draw = columns.shape[1] - start
    cache = _cache(decoder, rows, text, new + (to_draw - 1 if spare else 0))  # the last one is never read
    attention = RaggedAttention([cache], new)
    owner = torch.zeros(len(rows), dtype=torch.long, device=decoder.device)
    logits = decoder.logits(columns[None, :, :start], owner, attention, prefix[rows], check)
    attention.advance()
    return Prefilled(columns, start, cache, logits)


def lay_out(decoder: Decoder, request: DecodeRequest) -> tuple[Tensor, int]:
    """[K, S] columns with the prompt's tokens in their places, and the first one that is drawn."""
    given = 0 if request.prompt is None else request.prompt.shape[1]
    assert 0 <= given < request.length, f"{given} frames are given: no room to generate in {request.length}"
    codes = torch.full((decoder.codebooks, request.length), UNKNOWN, device=decoder.device)
    if request.prompt is not None:
        codes[:, :given] = request.prompt
    return interleave(codes, decoder.delays, special=decoder.card), first_column(given)


def rows_that_matter(conditions: Conditions, guidance: float) -> list[int]:
    """Which of the rows, 0 conditional and 1 null, guidance can tell apart.

    `null + (conditional - null) * guidance` is the null row at guidance 0, and either row where
    both are the same: no text, no melody.
    """
    if not conditions:
        return [0]
    if guidance == 0:
        return [1]
    same = all(torch.equal(embedding[0], embedding[1]) for embedding, _ in conditions.values())
    return [0] if same else [0, 1]


def rows_with_text(text: Tensor | None, rows: list[int]) -> list[int]:
    """Which of `rows` have a text that is not zero in `text` [2, S, D], as indices into `rows`.

    An all-zero text (the null condition) has zero values, so attending to it adds nothing.
    """
    return [] if text is None else [at for at, row in enumerate(rows) if text[row].any()]


def _cache(decoder: Decoder, rows: list[int], text: Tensor | None, capacity: int) -> RequestCache:
    decoder.reserve(capacity)
    with_text = rows_with_text(text, rows)
    keys_values = None
    if text is not None and with_text:
        keys_values = decoder.text_keys_values(text[[rows[at] for at in with_text]])
    return RequestCache(
        layers=len(decoder.layers),
        rows=len(rows),
        heads=decoder.heads,
        capacity=capacity,
        head=decoder.dim // decoder.heads,
        text=keys_values,
        text_rows=with_text,
        dtype=decoder.dtype,
        device=decoder.device,
    )
