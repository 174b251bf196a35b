"""The codec's stream: its pieces are the samples of the whole decode, and each comes as early as it can."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_encodec import encodec, in_transformers
from torch import Tensor

from musicgen_svc.audiocraft_compat import CompressionModel, InterleaveStereoCompressionModel
from musicgen_svc.models import encodec_stack
from musicgen_svc.models.encodec import Codec
from musicgen_svc.models.encodec_stream import PIECE_FRAMES

KINDS: dict[str, Callable[[], CompressionModel]] = {
    "audiocraft": encodec,
    "transformers": lambda: in_transformers(encodec()),
    "interleaved stereo": lambda: InterleaveStereoCompressionModel(encodec()),
    "two channels": lambda: encodec(channels=2),
    "no LSTM": lambda: encodec(lstm=0),
    "no LSTM, interleaved stereo": lambda: InterleaveStereoCompressionModel(encodec(lstm=0)),
    "reflected edges": lambda: encodec(pad_mode="reflect"),
    "causal": lambda: encodec(causal=True),
    "a norm over time": lambda: encodec(norm="time_group_norm"),
}


@pytest.fixture(scope="module", params=KINDS)
def codec(request: pytest.FixtureRequest) -> Codec:
    return Codec(KINDS[request.param]())


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def random_tokens(codec: Codec, frames: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(codec.cardinality, (codec.codebooks, frames), generator=generator)


def streamed(codec: Codec, tokens: Tensor, edges: list[int]) -> list[Tensor]:
    stream = codec.stream()
    pieces = [
        p for a, b in pairwise([0, *edges, tokens.shape[1]]) if a < b for p in stream.push(tokens[:, a:b])
    ]
    return [*pieces, *stream.finish()]


@pytest.mark.parametrize("frames", [1, 14, 15, 16, 40, 41, 333])
@pytest.mark.usefixtures("threads")
def test_the_pieces_joined_are_the_whole_decode_to_the_bit(codec: Codec, frames: int) -> None:
    tokens = random_tokens(codec, frames)
    whole = codec.decode(tokens)
    for edges in ([], list(range(1, frames)), [i for i in (7, 30, 31, 200) if i < frames]):
        assert torch.equal(torch.cat(streamed(codec, tokens, edges), 1), whole)


@settings(max_examples=25, deadline=None)
@given(frames=st.integers(1, 260), data=st.data())
def test_the_pieces_do_not_depend_on_how_the_tokens_come(frames: int, data: st.DataObject) -> None:
    codec = Codec(encodec())
    edges = sorted(data.draw(st.sets(st.integers(1, frames), max_size=12)))
    tokens = random_tokens(codec, frames)
    assert torch.equal(torch.cat(streamed(codec, tokens, edges), 1), codec.decode(tokens))


@pytest.mark.usefixtures("threads")
def test_full_size_codecs_are_exact_too() -> None:
    """Tested with the widths of MusicGen's codec, whose convolutions oneDNN computes in other ways."""
    codec = Codec(encodec(n_filters=64, dimension=128))
    tokens = random_tokens(codec, 70)
    assert torch.equal(torch.cat(streamed(codec, tokens, [20, 33, 61]), 1), codec.decode(tokens))


def test_each_piece_comes_as_soon_as_its_context_is_known() -> None:
    codec = Codec(encodec())
    front, back = codec._decoder._parts.front.context, codec._decoder._parts.back.context  # type: ignore[union-attr]
    assert 0 < front + back < PIECE_FRAMES[0]
    tokens, stream, seen = random_tokens(codec, 500), codec.stream(), []
    for frame in range(500):
        missing = stream.missing
        pieces = list(stream.push(tokens[:, frame : frame + 1]))
        assert bool(pieces) == (missing == 1)
        for piece in pieces:
            seen.append((frame + 1, piece.shape[1] // codec.hop))
    edges = [15, 40, 90, 190, 390]
    assert seen == [(e + front + back, n) for e, n in zip(edges, PIECE_FRAMES, strict=True)]
    assert [piece.shape[1] // codec.hop for piece in stream.finish()] == [110]


def test_the_stream_needs_the_state_of_the_lstm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that the tests above would fail if a piece began without the state of the one before."""
    codec = Codec(encodec())
    tokens = random_tokens(codec, 100)
    whole = codec.decode(tokens)
    run_lstm = encodec_stack.run_lstm
    monkeypatch.setattr("musicgen_svc.models.encodec_pieces.run_lstm", lambda a, x, _: run_lstm(a, x, None))
    assert not torch.allclose(torch.cat(streamed(codec, tokens, [50]), 1), whole, atol=1e-3)


def test_a_stream_keeps_no_more_than_a_piece_and_its_context() -> None:
    codec = Codec(encodec())
    stream, tokens = codec.stream(), random_tokens(codec, 1500)
    for start in range(0, 1500, 5):
        list(stream.push(tokens[:, start : start + 5]))
    (own,) = stream._streams
    kept = [recent._x.shape[-1] for recent in (own._input, own._hidden)]  # type: ignore[union-attr]
    assert max(kept) <= PIECE_FRAMES[-1] + 30, kept


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("kind", ["audiocraft", "interleaved stereo", "no LSTM"])
def test_on_a_gpu_the_pieces_are_the_whole_decode_up_to_rounding(kind: str) -> None:
    model: Any = KINDS[kind]().to("cuda")
    codec = Codec(model)
    tokens = random_tokens(codec, 555).to("cuda")
    together = torch.cat(streamed(codec, tokens, [20, 100]), 1)
    assert (together - codec.decode(tokens)).abs().max() < 1e-3
