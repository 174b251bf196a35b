"""The codec: one pass gives audiocraft's tokens, pieces give the result of one pass, memory is bounded."""

import math
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from random_encodec import RATE_HZ, encodec, in_transformers, noise
from torch import Tensor, nn

from musicgen_svc.audiocraft_compat import (
    CompressionModel,
    EncodecModel,
    InterleaveStereoCompressionModel,
)
from musicgen_svc.errors import Stopped, WeightsError
from musicgen_svc.models import encodec_pieces
from musicgen_svc.models.encodec import Codec
from musicgen_svc.models.encodec_pieces import PiecewiseStack
from musicgen_svc.models.encodec_stream import PIECE_FRAMES

HOP = 640  # samples per frame
KINDS: dict[str, Callable[[EncodecModel], CompressionModel]] = {
    "audiocraft": lambda m: m,
    "transformers": in_transformers,
    "audiocraft stereo": InterleaveStereoCompressionModel,
    "transformers stereo": lambda m: InterleaveStereoCompressionModel(in_transformers(m)),
}


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> CompressionModel:
    return KINDS[request.param](encodec())


@torch.no_grad()
def one_pass(model: CompressionModel, wav: Tensor) -> tuple[Tensor, Tensor]:
    """audiocraft's own tokens [K, F] and samples [C, T]."""
    tokens, scale = model.encode(wav[None])
    assert scale is None
    return tokens[0], model.decode(tokens)[0]


def rms_db(difference: Tensor, reference: Tensor) -> float:
    return 10 * math.log10(difference.pow(2).mean().item() / reference.pow(2).mean().item() + 1e-30)


@pytest.mark.parametrize("samples", [1, 639, 640, 641, 100_000])
def test_up_to_a_piece_the_tokens_are_audiocrafts_to_the_bit_and_the_samples_up_to_rounding(
    model: CompressionModel, samples: int
) -> None:
    codec = Codec(model)
    wav = noise(5.0, codec.channels)[:, :samples]
    tokens, samples_back = one_pass(model, wav)
    assert torch.equal(codec.encode(wav), tokens)
    assert tokens.shape == (codec.codebooks, -(-samples // HOP))
    decoded = codec.decode(tokens)
    assert decoded.shape == samples_back.shape == (codec.channels, tokens.shape[1] * HOP)
    assert rms_db(decoded - samples_back, samples_back) < -120
    if tokens.shape[1] <= PIECE_FRAMES[0]:  # one piece is one pass
        assert torch.equal(decoded, samples_back)


def test_pieces_together_are_one_pass(model: CompressionModel) -> None:
    """Tested on a minute of mono, or on 20 s of stereo, whose channels each take the time of mono."""
    channels = Codec(model).channels
    wav = noise(60.0 / (1 if channels == 1 else 3) + 0.0071, channels)
    tokens, samples = one_pass(model, wav)
    assert tokens.unique().numel() > 50
    for longest_piece in (1500, 333) if channels == 1 else (333,):
        codec = Codec(model, longest_piece)
        ours = codec.encode(wav)
        assert ours.shape == tokens.shape
        assert (ours == tokens).float().mean() >= 0.999
        assert rms_db(codec.decode(tokens) - samples, samples) < -60


def test_pieces_need_the_state_of_the_lstm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that the test above would fail if the LSTM started without a state in each piece."""
    run_lstm = encodec_pieces.run_lstm
    monkeypatch.setattr(encodec_pieces, "run_lstm", lambda layer, x, state: run_lstm(layer, x, None))
    model = encodec()
    wav = noise(20.0)
    tokens, samples = one_pass(model, wav)
    codec = Codec(model, longest_piece=500)
    assert (codec.encode(wav) == tokens).float().mean() < 0.6
    assert rms_db(codec.decode(tokens) - samples, samples) > -45


@pytest.mark.parametrize(
    "seanet",
    [
        {"pad_mode": "reflect"},
        {"causal": True},
        {"causal": True, "n_residual_layers": 3, "dilation_base": 4, "residual_kernel_size": 5},
        {"true_skip": False, "ratios": [7, 3, 2]},
        {"lstm": 1, "norm": "none", "last_kernel_size": 11},
        {"lstm": 0},
        {"lstm": 0, "pad_mode": "reflect", "ratios": [7, 3, 2]},
    ],
    ids=str,
)
@torch.no_grad()
def test_every_piece_has_its_full_receptive_field(seanet: dict[str, Any]) -> None:
    """The result is that of one pass up to rounding, for any SEANet and any length."""
    model = encodec(**seanet)
    for net, channels in [(model.encoder, 1), (model.decoder, 8)]:
        stack = PiecewiseStack(net.model)
        x = noise(3.0, channels)[None, :, : 150 * stack.rate_in - stack.rate_in // 8]
        whole = net(x)
        for frames in (70, 50, 1):
            pieces = list(stack.run(x, repeat(frames)))
            assert len(pieces) == -(-150 // frames)
            assert all(piece.shape[-1] <= frames * stack.rate_out for piece in pieces)
            together = torch.cat(pieces, -1)
            assert together.shape == whole.shape
            assert (together - whole).abs().max() < 1e-5 * whole.abs().max()


def test_a_stack_with_unknown_layers_takes_one_pass() -> None:
    model = encodec(norm="time_group_norm")
    wav = noise(3.0)
    tokens, samples = one_pass(model, wav)
    codec = Codec(model, longest_piece=40)
    assert torch.equal(codec.encode(wav), tokens)
    assert torch.equal(codec.decode(tokens), samples)


@torch.no_grad()
def test_two_lstms_or_one_that_also_runs_backwards_take_one_pass() -> None:
    def pieces(layers: list[nn.Module]) -> int:
        return len(list(PiecewiseStack(layers).run(noise(3.0)[None], repeat(50))))

    layers = list(encodec().encoder.model)
    assert pieces(layers) == 3
    assert pieces([*layers[:-2], layers[-3], *layers[-2:]]) == 1
    layers[-3].lstm = nn.LSTM(64, 32, 2, bidirectional=True)
    assert pieces(layers) == 1


def test_latents_are_those_of_the_quantizer_for_each_channel(model: CompressionModel) -> None:
    codec = Codec(model)
    tokens = codec.encode(noise(1.0, codec.channels))
    latents = codec.latents(tokens)
    stereo = isinstance(model, InterleaveStereoCompressionModel)
    mono = model.model if stereo else model
    channels = model.get_left_right_codes(tokens[None]) if stereo else [tokens[None]]
    assert torch.equal(latents, torch.cat([mono.decode_latent(codes) for codes in channels]))
    assert latents.shape == (codec.channels, 8, tokens.shape[1])


def test_both_channels_in_one_batch_give_the_same_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = Codec(InterleaveStereoCompressionModel(encodec()), longest_piece=100)
    tokens = codec.encode(noise(3.0, channels=2))
    one_by_one = codec.decode(tokens)
    monkeypatch.setattr(Codec, "_rows_at_once", lambda self, device: 2)
    assert rms_db(codec.decode(tokens) - one_by_one, one_by_one) < -100


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_pieces_together_are_one_pass_on_a_gpu() -> None:
    """Tested in full fp32: TF32 would round one pass and pieces differently."""
    model = InterleaveStereoCompressionModel(encodec()).to("cuda")
    codec = Codec(model)
    wav = noise(60.0, channels=2)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        tokens, samples = one_pass(model, wav.to("cuda"))
        ours, samples_back = codec.encode(wav), codec.decode(tokens)
    assert ours.is_cuda and samples_back.is_cuda
    assert (ours == tokens).float().mean() >= 0.999
    assert rms_db(samples_back - samples, samples) < -60


def test_a_codec_of_two_channels_needs_no_interleaving() -> None:
    model = encodec(channels=2)
    codec = Codec(model)
    wav = noise(1.0, channels=2)
    tokens, samples = one_pass(model, wav)
    assert (codec.channels, codec.codebooks) == (2, 4)
    assert torch.equal(codec.encode(wav), tokens)
    assert rms_db(codec.decode(tokens) - samples, samples) < -120


def test_the_attributes_of_a_codec_are_those_of_the_model(model: CompressionModel) -> None:
    codec = Codec(model)
    stereo = isinstance(model, InterleaveStereoCompressionModel)
    assert (codec.sample_rate, codec.hop, codec.frame_rate, codec.cardinality) == (RATE_HZ, HOP, 50.0, 64)
    assert (codec.channels, codec.codebooks) == ((2, 8) if stereo else (1, 4))


def test_the_same_codebooks_have_the_same_fingerprint_in_either_library() -> None:
    one = encodec()
    prints = {Codec(make(one)).fingerprint() for make in KINDS.values()}
    assert len(prints) == 1
    one.quantizer.vq.layers[3].codebook[5, 2] += 1e-6
    assert Codec(one).fingerprint() not in prints


def test_every_layer_of_every_piece_ticks_and_the_last_tick_is_the_total(model: CompressionModel) -> None:
    codec = Codec(model, longest_piece=40)
    seen: list[tuple[int, int]] = []
    tokens = codec.encode(noise(3.0, codec.channels), lambda *args: seen.append(args))
    ticks_of_encode, seen = seen, []
    codec.decode(tokens, lambda *args: seen.append(args))
    for ticks in (ticks_of_encode, seen):
        total = ticks[-1][1]
        assert [done for done, _ in ticks] == list(range(1, total + 1))
        assert {t for _, t in ticks} == {total}
        assert total >= 4 * codec.channels * 3  # pieces, channels, and several layers


@pytest.mark.parametrize("at", [1, 20])
def test_a_tick_that_raises_ends_the_work_and_the_codec_stays_usable(at: int) -> None:
    codec = Codec(encodec(), longest_piece=40)
    wav = noise(3.0)
    tokens = codec.encode(wav)
    samples = codec.decode(tokens)

    def stop(done: int, total: int) -> None:
        if done == at:
            raise Stopped

    with pytest.raises(Stopped):
        codec.encode(wav, stop)
    with pytest.raises(Stopped):
        codec.decode(tokens, stop)
    assert torch.equal(codec.encode(wav), tokens)
    assert torch.equal(codec.decode(tokens), samples)


def test_tokens_out_of_range_fail_an_assertion() -> None:
    codec = Codec(encodec())
    for tokens in (torch.full((4, 3), 64), torch.full((4, 3), -1), torch.zeros(8, 3, dtype=torch.int64)):
        with pytest.raises(AssertionError):
            codec.decode(tokens)
    with pytest.raises(AssertionError):
        codec.encode(noise(1.0, channels=2))


@pytest.mark.parametrize("config", [{"normalize": True}, {"chunk_length_s": 1.0, "overlap": 0.01}])
def test_a_codec_with_more_than_tokens_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(WeightsError, match=f"{next(iter(config))} {next(iter(config.values()))}"):
        Codec(in_transformers(encodec(), **config))
    with pytest.raises(WeightsError, match="renormalize true"):
        Codec(encodec(renormalize=True))


def status_mb(field: str) -> float:
    """Returns a field of Linux' status of this process: VmRSS, its memory now, or VmHWM, the peak of it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e6


def grown_mb(codec: Codec, seconds: float) -> float:
    """Returns the largest growth of memory while audio is encoded and decoded."""
    wav = torch.zeros(1, int(seconds * RATE_HZ)).normal_(generator=torch.Generator().manual_seed(0))
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status_mb("VmRSS")
    codec.decode(codec.encode(wav))
    return status_mb("VmHWM") - before


def growths_mb() -> tuple[float, float, float]:
    """Returns the growth for one and three minutes with a small codec, and for a piece with a wider one."""
    small, wide = Codec(encodec(n_filters=2)), Codec(encodec(n_filters=16))
    grown_mb(small, 60), grown_mb(wide, 30)  # torch and the allocator keep some memory of a first run
    return grown_mb(small, 60), grown_mb(small, 180), grown_mb(wide, 30)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux' memory peak")
def test_memory_is_that_of_a_piece_however_long_the_audio() -> None:
    """Three minutes need as much as one, plus the samples; 15 minutes at full size need less than 2 GB."""
    # In another process, because this one would first reuse memory that other tests have freed.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        minute, three, piece = process.submit(growths_mb).result()
    samples_a_second = RATE_HZ * 4 / 1e6
    assert three < minute + 180 * samples_a_second + 40, (minute, three)
    # Activations are proportional to the filters, of which MusicGen's codec has 64.
    assert piece * 64 / 16 + 900 * samples_a_second < 2_000, piece
