"""EnCodec: encodes audio to tokens and decodes tokens to audio, with working memory for one piece.

The model is that of Défossez et al., "High Fidelity Neural Audio Compression" (2022, arXiv:2210.13438).
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from musicgen_svc.audiocraft_compat import (
    CompressionModel,
    EncodecModel,
    HFEncodecCompressionModel,
    InterleaveStereoCompressionModel,
)
from musicgen_svc.errors import WeightsError
from musicgen_svc.models.encodec_pieces import PiecewiseStack
from musicgen_svc.models.encodec_stream import CodecStream, stream_pieces
from musicgen_svc.runtime.ticks import Tick, no_tick

LONGEST_PIECE = 1500
"""Frames: 30 s at 50 Hz, one window of the language model. MusicGen's codec takes 1.1 to 1.4 GB for it."""


class Codec:
    """An EnCodec that processes long audio in pieces.

    Audio of at most one piece is encoded in one pass, whose tokens on a CPU are those of audiocraft to the
    last bit. Longer audio, and on a CPU every decoded audio, gives the result of one pass up to rounding,
    because the convolutions of each piece have their full receptive field and the LSTM's state continues from
    piece to piece. On a CPU `decode` has the pieces of `stream`, so both give the same samples, to the last
    bit.

    The codec computes in the weights' own precision; results are on the weights' device.
    """

    sample_rate: int
    hop: int
    """Samples per frame."""
    frame_rate: float
    """Frames per second."""
    channels: int
    """1 or 2."""
    codebooks: int
    """How many there are; where left and right have codebooks of their own, both are counted."""
    cardinality: int
    """The number of entries of a codebook."""
    parameter_count: int
    """The number of its weights."""

    def __init__(self, model: CompressionModel, longest_piece: int = LONGEST_PIECE) -> None:
        """Makes a codec of audiocraft's model.

        Args:
            model: audiocraft's EncodecModel or HFEncodecCompressionModel, or either of them inside an
                InterleaveStereoCompressionModel, which codes left and right separately.
            longest_piece: the frames of the longest audio that is encoded, and on a GPU decoded, in one pass.
                Memory grows with this number.

        Raises:
            WeightsError: MusicGen cannot use the codec, because audio is more than its tokens, or the
                receptive field is too large for pieces.
        """
        self._rows = 1
        """R, the number of signals that are coded separately: 2 if interleaved, else 1."""
        if isinstance(model, InterleaveStereoCompressionModel):
            assert not model.per_timestep, "left and right interleaved in time: frames are not tokens"
            model, self._rows = model.model, 2
        self._mono = model
        self._parts = _parts(model)
        self._encoder, self._decoder = (
            PiecewiseStack(self._parts.encoder),
            PiecewiseStack(self._parts.decoder),
        )
        if 2 * (self._decoder.context + 1) > LONGEST_PIECE // 2:  # a GPU decodes two half pieces at once
            raise WeightsError(
                f"The codec's decoder looks at {self._decoder.context} frames to either side, which is more "
                "than a piece has."
            )
        self._longest_piece = longest_piece
        self.hop = self._encoder.rate_in
        assert self._decoder.rate_out == self.hop, (self.hop, self._decoder.rate_out)
        self.sample_rate = int(model.sample_rate)
        self.frame_rate = float(model.frame_rate)
        self.channels = int(model.channels) * self._rows
        self.codebooks = int(model.num_codebooks) * self._rows
        self.cardinality = int(model.cardinality)
        self.parameter_count = sum(parameter.numel() for parameter in model.parameters())

    @torch.no_grad()
    def encode(self, wav: Tensor, tick: Tick = no_tick) -> Tensor:
        """Encodes audio to tokens.

        Args:
            wav: [C, T], T > 0, at the codec's sample rate.
            tick: called after each layer of each piece, and on a CPU within long layers.

        Returns:
            [K, ceil(T / hop)] int64.
        """
        assert wav.ndim == 2 and wav.shape[0] == self.channels and wav.shape[1] > 0, wav.shape
        like = next(self._mono.parameters())
        rows = wav.to(like.device, like.dtype).reshape(self._rows, -1, wav.shape[1])  # [R, C / R, T]
        lengths = _equal(-(-wav.shape[1] // self.hop), self._longest_piece)
        codes = []
        for i in range(self._rows):  # one by one, so that the tokens are exactly audiocraft's
            pieces = self._encoder.run(rows[i : i + 1], lengths, _share(tick, i, self._rows))
            codes.append(torch.cat([self._parts.quantize(z) for z in pieces], -1))  # [1, K / R, F]
        return torch.cat(codes).transpose(0, 1).flatten(0, 1)

    @torch.no_grad()
    def decode(self, tokens: Tensor, tick: Tick = no_tick) -> Tensor:
        """Decodes tokens to audio.

        Args:
            tokens: [K, F], F > 0, each in [0, cardinality).
            tick: called after each layer of each piece, and on a CPU within long layers.

        Returns:
            [C, F * hop] at the codec's sample rate.
        """
        z = self.latents(tokens)  # [R, D, F]
        wav = z.new_empty(self._rows, self.channels // self._rows, z.shape[-1] * self.hop)
        at_once = self._rows_at_once(z.device)
        for i in range(0, self._rows, at_once):
            share, done = _share(tick, i // at_once, self._rows // at_once), 0
            # A piece is shorter by the size of the batch, so it takes the same memory.
            lengths = _equal(z.shape[-1], self._longest_piece // at_once) if z.is_cuda else stream_pieces()
            for piece in self._decoder.run(z[i : i + at_once], lengths, share):
                wav[i : i + at_once, :, done : done + piece.shape[-1]] = piece
                done += piece.shape[-1]
            assert done == wav.shape[-1], (done, wav.shape)
        return wav.flatten(0, 1)

    def stream(self) -> CodecStream:
        """Returns a decoder for tokens that come bit by bit."""
        at_once = self._rows_at_once(next(self._mono.parameters()).device)
        rows = [self._decoder.stream(stream_pieces()) for _ in range(0, self._rows, at_once)]
        return CodecStream(self.latents, rows, at_once)

    @torch.no_grad()
    def latents(self, tokens: Tensor) -> Tensor:
        """Returns the decoder's input for tokens: [K, F] -> [R, D, F]. MultiBand Diffusion needs it too."""
        assert tokens.ndim == 2 and tokens.shape[0] == self.codebooks and tokens.shape[1] > 0, tokens.shape
        # On a GPU an index out of range would make the device unusable for the whole process.
        low, high = (int(v) for v in tokens.aminmax())
        assert low >= 0 and high < self.cardinality, (low, high)
        codes = tokens.to(next(self._mono.parameters()).device)
        codes = codes.reshape(-1, self._rows, tokens.shape[1]).transpose(0, 1)  # [R, K / R, F]
        z: Tensor = self._mono.decode_latent(codes)
        return z

    def fingerprint(self) -> str:
        """Returns the sha256 of the codebooks, in hex: equal for codecs whose tokens mean the same.

        It does not depend on the library that the codec was made with.
        """
        digest = hashlib.sha256()
        for codebook in self._parts.codebooks():
            digest.update(codebook.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _rows_at_once(self, device: torch.device) -> int:
        """Returns how many signals to decode at once.

        A GPU decodes both channels in the time of one. A CPU gains nothing, and only one by one are its
        results exactly audiocraft's.
        """
        return self._rows if device.type == "cuda" else 1


def _equal(frames: int, longest: int) -> list[int]:
    """Returns the lengths of as few pieces as possible, about equal and not longer than `longest`."""
    pieces = -(-frames // longest)
    return [(i + 1) * frames // pieces - i * frames // pieces for i in range(pieces)]


@dataclass(frozen=True)
class _Parts:
    """The parts of a codec that audiocraft and transformers name differently."""

    encoder: Iterable[nn.Module]
    decoder: Iterable[nn.Module]
    quantize: Callable[[Tensor], Tensor]
    """[B, D, F] -> [B, K, F]"""
    codebooks: Callable[[], list[Tensor]]
    """Each [cardinality, D]."""


def _parts(model: CompressionModel) -> _Parts:
    """Returns the parts of either library's codec.

    Raises:
        WeightsError: the codec stores a loudness or chunks beside its tokens.
    """
    if isinstance(model, HFEncodecCompressionModel):
        hf = model.model
        if hf.config.normalize or hf.config.chunk_length_s is not None:
            raise _unsuitable(f"normalize {hf.config.normalize}, chunk_length_s {hf.config.chunk_length_s}")
        bandwidth = hf.config.target_bandwidths[model.possible_num_codebooks.index(model.num_codebooks)]
        return _Parts(
            encoder=hf.encoder.layers,
            decoder=hf.decoder.layers,
            quantize=lambda z: hf.quantizer.encode(z, bandwidth).transpose(0, 1),
            codebooks=lambda: [layer.codebook.embed for layer in hf.quantizer.layers],
        )
    assert isinstance(model, EncodecModel), type(model)
    if model.renormalize:
        raise _unsuitable("renormalize true")
    return _Parts(
        encoder=model.encoder.model,
        decoder=model.decoder.model,
        quantize=model.quantizer.encode,
        codebooks=lambda: [layer.codebook for layer in model.quantizer.vq.layers],
    )


def _unsuitable(setting: str) -> WeightsError:
    """Returns the error for a codec with a setting that MusicGen cannot use."""
    return WeightsError(
        f"The codec keeps a loudness or a chunk beside its tokens ({setting}), which MusicGen does not "
        "generate; a codec that does neither, such as encodec_32khz, is supported."
    )


def _share(tick: Tick, index: int, count: int) -> Tick:
    """Returns a tick for share `index` of `count` equal shares of the work."""
    return lambda done, total: tick(index * total + done, count * total)
