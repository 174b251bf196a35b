"""MultiBand Diffusion: decodes tokens to audio, with one diffusion model for each frequency band.

The models, schedules and processors are audiocraft's (San Roman et al., "From Discrete Tokens to
High-Fidelity Audio Using Multi-Band Diffusion", 2023, arXiv:2308.02560). So are the random draws: a mono
piece of one window has the samples that audiocraft's `tokens_to_wav` gives. The differences:

- Length. A U-Net normalizes over time, so it cannot be computed exactly in chunks. A piece longer than
  `window_s` is computed in windows, and at every step the overlapping parts of their *estimates* are
  crossfaded, with the same noise for all windows. So the windows stay in phase, which finished waveforms
  would not be. Filters run in pieces with their full context. Only the samples themselves need memory that
  grows with the length.
- Channels. Each channel is decoded separately from the same noise, so equal channels stay equal.
- Equalization. It is done per channel, and a band that the models left silent stays silent.
- Precision. On a GPU the U-Nets compute in fp16 where autocast considers it safe; the diffusion chain and its
  noise are fp32. The numbers of the schedule are on the host, so that reading them does not wait for the GPU.

This module knows no text and no files. It draws from torch's global generator, which the caller pins.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise

import torch
from julius import LowPassFilters, SplitBands
from torch import nn

from musicgen_svc.errors import WeightsError
from musicgen_svc.models.diffusion_bands import Band
from musicgen_svc.models.encodec import Codec
from musicgen_svc.models.slices import InSlices
from musicgen_svc.runtime.ticks import Tick, no_tick

OVERLAP_S = 2.0  # of two windows, if they are long enough
PIECE_S = 2.0  # what a filter bank processes at once
AHEAD = 2  # evaluations that a GPU may have in its queue: it is never idle, and the progress is accurate
EQUALIZER_BANDS = 32
SILENCE = 1e-9  # standard deviation of a band below which there is nothing to equalize


class MultiBandDiffusion:
    """The decoder. Its memory is bounded by `window_s`, the longest input of a U-Net."""

    def __init__(
        self, bands: list[Band], codec: Codec, window_s: float = 60.0, half: bool | None = None
    ) -> None:
        """Makes a decoder.

        Args:
            bands: the models, as `load_bands` gives them.
            codec: the codec of the tokens.
            window_s: the longest input of a U-Net, in seconds.
            half: whether the U-Nets run under fp16 autocast; None: only on a GPU.

        Raises:
            WeightsError: the bands were trained for a codec of another sample rate or with longer frames.
        """
        if wrong := {band.sample_rate for band in bands} - {codec.sample_rate}:
            raise WeightsError(
                f"The MultiBand Diffusion checkpoint is for a codec at {wrong.pop()} Hz; "
                f"this one is at {codec.sample_rate} Hz."
            )
        if any(band.shrinks > 2 * codec.hop for band in bands):
            raise WeightsError(
                "The MultiBand Diffusion checkpoint has a U-Net that shrinks audio "
                f"{max(band.shrinks for band in bands)} times; for this codec, of {codec.hop} samples a "
                f"frame, {2 * codec.hop} times is the most."
            )
        self._bands, self._codec = bands, codec
        self._device = next(bands[0].unet.parameters()).device
        self._half = self._device.type == "cuda" if half is None else half
        self._window = max(4, int(window_s * codec.sample_rate / codec.hop))
        self._overlap = min(int(OVERLAP_S * codec.sample_rate / codec.hop), self._window // 4)
        self._piece = int(PIECE_S * codec.sample_rate)
        self._split = SplitBands(codec.sample_rate, EQUALIZER_BANDS).to(self._device)

    @torch.no_grad()
    def decode(self, tokens: torch.Tensor, tick: Tick = no_tick) -> torch.Tensor:
        """Decodes tokens to audio whose bands have the levels of EnCodec's decoding.

        Args:
            tokens: [K, F], F > 0.
            tick: called with the number of finished evaluations of a U-Net: after each of them, between the
                pieces of a filter and, on a CPU, between the slices of a U-Net's long layers.

        Returns:
            [C, F * hop] float32 at the codec's sample rate.

        Raises:
            WeightsError: the bands were trained for a codec with other latents.
        """
        latents = self._codec.latents(tokens).float()  # [C, D, F]
        self._check(*latents.shape[:2])
        windows = plan(tokens.shape[-1], self._window, self._overlap)
        evaluations = sum(len(band.steps) - 1 for band in self._bands)
        count = _Count(tick, len(latents) * evaluations * len(windows), self._device)
        reference = self._codec.decode(tokens, count.unchanged).float()  # [C, T]
        forked = [self._device] if self._device.type == "cuda" else []
        channels = []
        for channel, condition in enumerate(latents):
            # The generator is restored after all channels but the last, so each of them draws the same noise.
            with torch.random.fork_rng(forked, enabled=channel < len(latents) - 1):
                wav = self._diffuse(condition[None], windows, count)
            channels.append(self._equalize(wav, reference[channel].view_as(wav), count)[0, 0])
        return torch.stack(channels)

    def _check(self, channels: int, dimension: int) -> None:
        """Checks that the bands were trained on latents of this dimension, for each of these channels."""
        wanted = {band.dimension for band in self._bands}
        if wanted != {dimension} or channels != self._codec.channels:
            raise WeightsError(
                f"The MultiBand Diffusion checkpoint is for a codec with {min(wanted)} latent dimensions per "
                f"channel; this one has {channels * dimension} for {self._codec.channels} channel(s)."
            )

    def _diffuse(
        self, condition: torch.Tensor, windows: list[tuple[int, int]], count: "_Count"
    ) -> torch.Tensor:
        """Decodes one channel as the sum of its bands: [1, D, F] -> [1, 1, F * hop]."""
        out = torch.zeros(1, 1, condition.shape[-1] * self._codec.hop, device=self._device)
        for band in self._bands:
            end = band.schedule.generate_subsampled(
                model=_Windowed(band.unet, windows, self._codec.hop, count, half=self._half),
                initial=torch.randn_like(out),
                step_list=band.steps,
                condition=condition,
            )
            to_audio, start = band.processor.return_sample, 0
            for part in in_pieces(to_audio, end, self._piece, _reach(band.processor)):
                out[..., start : start + part.shape[-1]] += part
                start += part.shape[-1]
                count.unchanged()
        return out

    def _equalize(self, wav: torch.Tensor, reference: torch.Tensor, count: "_Count") -> torch.Tensor:
        """Scales every band of wav [1, 1, T] to the standard deviation of the reference's band."""
        actual, wanted = self._deviations(wav, count), self._deviations(reference, count)
        gains = torch.where(actual > SILENCE, wanted / actual.clamp(min=SILENCE), 0).to(wav.dtype)
        mixed = []
        for bands in in_pieces(self._split, wav, self._piece, _reach(self._split)):
            mixed.append((bands * gains.view(-1, 1, 1, 1)).sum(0))
            count.unchanged()
        return torch.cat(mixed, -1)

    def _deviations(self, wav: torch.Tensor, count: "_Count") -> torch.Tensor:
        """Returns the standard deviation of each band of wav [1, 1, T]: [EQUALIZER_BANDS] float64."""
        total = square = torch.zeros(EQUALIZER_BANDS, dtype=torch.double, device=self._device)
        for bands in in_pieces(self._split, wav, self._piece, _reach(self._split)):
            flat = bands.flatten(1).double()
            total, square = total + flat.sum(1), square + flat.square().sum(1)
            count.unchanged()
        samples = wav.shape[-1]
        return (square / samples - (total / samples).square()).clamp(min=0).sqrt()


def plan(frames: int, window: int, overlap: int) -> list[tuple[int, int]]:
    """Returns windows [start, stop) that cover `frames` frames.

    They have about equal lengths, at most `window` frames, and each overlaps the next by `overlap` frames.
    """
    assert 0 <= 4 * overlap <= window, (window, overlap)  # so that no frame is in three windows
    if frames <= window:
        return [(0, frames)]
    number = -(-(frames - overlap) // (window - overlap))
    edges = [index * (frames - overlap) // number for index in range(number + 1)]
    return [(start, stop + overlap) for start, stop in pairwise(edges)]


def in_pieces(
    transform: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, piece: int, reach: int
) -> Iterator[torch.Tensor]:
    """Applies a filter to x [..., T] in pieces, and yields the result of each piece.

    Args:
        transform: the filter, which keeps the length of its input.
        x: [..., T].
        piece: samples of the longest piece.
        reach: how many samples on either side an output of `transform` depends on.
    """
    length = x.shape[-1]
    for start in range(0, length, piece):
        stop, first = min(start + piece, length), max(0, start - reach)
        y = transform(x[..., first : stop + reach].contiguous())
        yield y[..., start - first : stop - first]


def _reach(module: nn.Module) -> int:
    """Returns how many samples on either side an output of a module's filters depends on."""
    return max((part.half_size for part in module.modules() if isinstance(part, LowPassFilters)), default=0)


@dataclass(frozen=True)
class _Estimate:
    """The output of a model, as audiocraft's schedule expects it."""

    sample: torch.Tensor


class _Windowed:
    """A U-Net for any length. Crossfades the estimates of its windows, with gains that add up to 1."""

    def __init__(
        self, unet: nn.Module, windows: list[tuple[int, int]], hop: int, count: "_Count", *, half: bool
    ) -> None:
        self._unet, self._windows, self._hop, self._count, self._half = unet, windows, hop, count, half

    def __call__(self, x: torch.Tensor, step: int, condition: torch.Tensor) -> _Estimate:
        """Estimates the noise: x [1, 1, F * hop] and condition [1, D, F] -> sample [1, 1, F * hop]."""
        out = torch.zeros_like(x)
        steps = torch.full(
            (len(x),), step, device=x.device
        )  # from an int the U-Net makes a tensor, which waits for the GPU
        known = 0  # frames that already have an estimate
        for start, stop in self._windows:
            part = slice(start * self._hop, stop * self._hop)
            half = torch.autocast(x.device.type, torch.float16) if self._half else nullcontext()
            with half, InSlices(self._count.unchanged):
                answer = self._unet(x[..., part], steps, condition=condition[..., start:stop])
            estimate = answer.sample.to(x.dtype)
            shared = (known - start) * self._hop
            if shared > 0:
                rise = (torch.arange(shared, device=x.device) + 0.5) / shared
                out[..., part][..., :shared] *= 1 - rise
                estimate[..., :shared] *= rise
            out[..., part] += estimate
            known = stop
            self._count()
        return _Estimate(out)


class _Count:
    """Counts the evaluations of the U-Nets, which take nearly all the time, and reports the count."""

    def __init__(self, tick: Tick, total: int, device: torch.device) -> None:
        self._tick, self._done, self._total, self._device = tick, 0, total, device
        self._enqueued: deque[torch.cuda.Event] = deque()

    def __call__(self) -> None:
        """Counts one more evaluation. On a GPU, waits until at most `AHEAD` are in the queue."""
        if self._device.type == "cuda":
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))
            self._enqueued.append(event)
            if len(self._enqueued) > AHEAD:
                self._enqueued.popleft().synchronize()
        self._done += 1
        self.unchanged()

    def unchanged(self, *_: object) -> None:
        """Reports the same count again, so that the tick can stop the request. May serve as a tick itself."""
        self._tick(self._done, self._total)
