"""EnCodec: audio <-> tokens, with memory that is bounded in the audio's length."""

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
from musicgen_svc.models.encodec_chunks import ChunkedStack
from musicgen_svc.runtime.ticks import Tick, no_tick

CHUNK_FRAMES = 1500
"""30 s at 50 Hz: a whole window of the model, at 1.1 to 1.4 GB of working memory in MusicGen's codec."""


class Codec:
    """EnCodec, in chunks whose convolutions see their full receptive field, and their LSTM what came before.

    Audio of at most a chunk takes one pass: the tokens and samples of audiocraft, to the last bit
    (on a CPU). Longer audio gives what one pass would, but for rounding.

    Runs in the weights' own precision. Results lie where the weights do.
    """

    sample_rate: int
    hop: int
    """Samples per frame."""
    frame_rate: float
    """Frames per second."""
    channels: int
    """1 or 2."""
    codebooks: int
    """Those of both channels, where each has its own."""
    cardinality: int
    """Entries of a codebook."""

    def __init__(self, model: CompressionModel, chunk_frames: int = CHUNK_FRAMES) -> None:
        """
        Args:
            model: audiocraft's EncodecModel or HFEncodecCompressionModel, or either as an
                InterleaveStereoCompressionModel, which codes left and right each by itself.
            chunk_frames: the longest audio that takes one pass. Memory grows with it, not with the audio.

        Raises:
            WeightsError: a codec whose tokens alone are not the audio, so that no MusicGen can use it, or
                one that looks too far to be cut into chunks.
        """
        self._rows = 1
        """Signals that are coded each by itself: the channels, if interleaved."""
        if isinstance(model, InterleaveStereoCompressionModel):
            assert not model.per_timestep, "left and right interleaved in time: frames are not tokens"
            model, self._rows = model.model, 2
        self._mono = model
        self._parts = _parts(model)
        self._encoder, self._decoder = ChunkedStack(self._parts.encoder), ChunkedStack(self._parts.decoder)
        if 2 * (self._decoder.context + 1) > CHUNK_FRAMES // 2:  # of which a GPU takes two halves at once
            raise WeightsError(
                f"The codec's decoder looks at {self._decoder.context} frames to either side, which is more "
                "than a chunk has."
            )
        self._chunk_frames = chunk_frames
        self.hop = self._encoder.rate_in
        assert self._decoder.rate_out == self.hop, (self.hop, self._decoder.rate_out)
        self.sample_rate = int(model.sample_rate)
        self.frame_rate = float(model.frame_rate)
        self.channels = int(model.channels) * self._rows
        self.codebooks = int(model.num_codebooks) * self._rows
        self.cardinality = int(model.cardinality)

    @torch.no_grad()
    def encode(self, wav: Tensor, tick: Tick = no_tick) -> Tensor:
        """wav: [C, T], T > 0 -> tokens [K, ceil(T / hop)], int64."""
        assert wav.ndim == 2 and wav.shape[0] == self.channels and wav.shape[1] > 0, wav.shape
        like = next(self._mono.parameters())
        rows = wav.to(like.device, like.dtype).reshape(self._rows, -1, wav.shape[1])  # [R, C / R, T]
        codes = []
        for i in range(self._rows):  # one by one, so that the tokens are audiocraft's to the last
            pieces = self._encoder.run(rows[i : i + 1], self._chunk_frames, _share(tick, i, self._rows))
            codes.append(torch.cat([self._parts.quantize(z) for z in pieces], -1))  # [1, K / R, F]
        return torch.cat(codes).transpose(0, 1).flatten(0, 1)

    @torch.no_grad()
    def decode(self, tokens: Tensor, tick: Tick = no_tick) -> Tensor:
        """tokens: [K, F], F > 0 -> wav [C, F * hop]."""
        z = self.latents(tokens)  # [R, D, F]
        wav = z.new_empty(self._rows, self.channels // self._rows, z.shape[-1] * self.hop)
        at_once = self._rows_at_once(z.device)
        for i in range(0, self._rows, at_once):
            share, done = _share(tick, i // at_once, self._rows // at_once), 0
            # Chunks as much shorter as the batch is wide take the same memory.
            for piece in self._decoder.run(z[i : i + at_once], self._chunk_frames // at_once, share):
                wav[i : i + at_once, :, done : done + piece.shape[-1]] = piece
                done += piece.shape[-1]
            assert done == wav.shape[-1], (done, wav.shape)
        return wav.flatten(0, 1)

    @torch.no_grad()
    def latents(self, tokens: Tensor) -> Tensor:
        """What the decoder makes its samples of, for MultiBand Diffusion: [K, F] -> [C, D, F]."""
        assert tokens.ndim == 2 and tokens.shape[0] == self.codebooks and tokens.shape[1] > 0, tokens.shape
        # On a GPU an index out of range would end not the request, but the process's use of the device.
        low, high = (int(v) for v in tokens.aminmax())
        assert low >= 0 and high < self.cardinality, (low, high)
        codes = tokens.to(next(self._mono.parameters()).device)
        codes = codes.reshape(-1, self._rows, tokens.shape[1]).transpose(0, 1)  # [R, K / R, F]
        z: Tensor = self._mono.decode_latent(codes)
        return z

    def fingerprint(self) -> str:
        """sha256 of the codebooks: what the tokens mean, whichever library spelled the codec."""
        digest = hashlib.sha256()
        for codebook in self._parts.codebooks():
            digest.update(codebook.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _rows_at_once(self, device: torch.device) -> int:
        """A GPU decodes both channels in the time of one; a CPU gains nothing, and is exact one by one."""
        return self._rows if device.type == "cuda" else 1


@dataclass(frozen=True)
class _Parts:
    """What the two libraries spell differently."""

    encoder: Iterable[nn.Module]
    decoder: Iterable[nn.Module]
    quantize: Callable[[Tensor], Tensor]
    """[B, D, F] -> [B, K, F]"""
    codebooks: Callable[[], list[Tensor]]
    """Each [cardinality, D]."""


def _parts(model: CompressionModel) -> _Parts:
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
    return WeightsError(
        f"The codec keeps a loudness or a chunk beside its tokens ({setting}), which MusicGen does not "
        "generate; a codec that does neither, such as encodec_32khz, is supported."
    )


def _share(tick: Tick, index: int, parts: int) -> Tick:
    """The tick of one of several equal parts of the work."""
    return lambda done, total: tick(index * total + done, parts * total)
