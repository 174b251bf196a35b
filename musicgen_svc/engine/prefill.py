"""The prefill of a request: lays out its columns, and computes its prefix and prompt in one forward pass."""

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
    """A request after its prefill, before its first draw."""

    columns: Tensor  # [K, S], delayed; UNKNOWN where a token has to be drawn
    start: int  # the first column to draw
    cache: RequestCache  # holds the prefix and columns [0, start)
    logits: Tensor  # [rows, K, card], from which column `start` is drawn


def prefill(decoder: Decoder, request: DecodeRequest, *, room_to_decode: bool, check: Check) -> Prefilled:
    """Prefills a request.

    Args:
        decoder: computes the forward pass.
        request: what to decode.
        room_to_decode: whether the cache gets room for the columns to draw as well.
        check: is called several times per layer, and may raise to end the request.
    """
    columns, start = lay_out(decoder, request)
    prefix, text = decoder.fuse(request.conditions)
    rows = needed_rows(request.conditions, request.sampling.guidance)
    new = prefix.shape[1] + start
    to_draw = columns.shape[1] - start
    cache = _cache(
        decoder, rows, text, new + (to_draw - 1 if room_to_decode else 0)
    )  # the last column is not read
    attention = RaggedAttention([cache], new)
    request_of_row = torch.zeros(len(rows), dtype=torch.long, device=decoder.device)
    logits = decoder.logits(columns[None, :, :start], request_of_row, attention, prefix[rows], check)
    attention.advance()
    return Prefilled(columns, start, cache, logits)


def lay_out(decoder: Decoder, request: DecodeRequest) -> tuple[Tensor, int]:
    """Lays out the columns of a request.

    Returns:
        tuple: columns [K, S] with the prompt's tokens, and the first column to draw.
    """
    given = 0 if request.prompt is None else request.prompt.shape[1]
    assert 0 <= given < request.length, f"{given} frames are given: no room to generate in {request.length}"
    codes = torch.full((decoder.codebooks, request.length), UNKNOWN, device=decoder.device)
    if request.prompt is not None:
        codes[:, :given] = request.prompt
    return interleave(codes, decoder.delays, special=decoder.card), first_column(given)


def needed_rows(conditions: Conditions, guidance: float) -> list[int]:
    """Returns the rows that classifier-free guidance needs: 0 is the conditional row, 1 the null row.

    `null + (conditional - null) * guidance` is the null row if the guidance is 0. If both rows are the same,
    as without a text and a melody, one row is enough.
    """
    if not conditions:
        return [0]
    if guidance == 0:
        return [1]
    same = all(torch.equal(embedding[0], embedding[1]) for embedding, _ in conditions.values())
    return [0] if same else [0, 1]


def rows_with_text(text: Tensor | None, rows: list[int]) -> list[int]:
    """Returns which of `rows` have a text, as indices into `rows`.

    A row of `text` [2, S, D] that is all zero (the null condition) does not count: its values are zero, so
    attention to it adds nothing.
    """
    return [] if text is None else [index for index, row in enumerate(rows) if text[row].any()]


def _cache(decoder: Decoder, rows: list[int], text: Tensor | None, capacity: int) -> RequestCache:
    """Makes a cache with `capacity` positions, and computes the keys and values of the text."""
    decoder.reserve(capacity)
    with_text = rows_with_text(text, rows)
    keys_values = None
    if text is not None and with_text:
        keys_values = decoder.text_keys_values(text[[rows[index] for index in with_text]])
    return RequestCache(
        layers=len(decoder.layers),
        rows=len(rows),
        heads=decoder.heads,
        capacity=capacity,
        head=decoder.head_dim,
        text=keys_values,
        text_rows=with_text,
        dtype=decoder.dtype,
        device=decoder.device,
    )
