"""The four ways to set a level, as audiocraft's `normalize_audio` defines them: tensors in, tensors out.

| strategy   | result                                                          |
|------------|-----------------------------------------------------------------|
| `loudness` | -14 LUFS by ITU-R BS.1770-4, then limited softly                |
| `rms`      | -18 dBFS RMS of the mono downmix, then clipped at full scale    |
| `peak`     | highest sample at -1 dBFS                                       |
| `clip`     | level as it is, clipped at -1 dBFS                              |

What differs from audiocraft, on purpose: `loudness` bends what goes above a knee instead of clipping it;
silence stays silence and is never divided by; an offset, which nobody hears, is neither counted as sound nor
turned up with it; a clip too short for a gating block is measured whole; and
a stereo signal whose channels cancel each other in the downmix is not blown up for it.
"""

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torchaudio.functional import highpass_biquad, treble_biquad

from musicgen_svc.runtime.ticks import Tick, no_tick

Strategy = Literal["loudness", "clip", "peak", "rms"]

TARGET_LUFS = -14.0
TARGET_RMS_DB = -18.0
TARGET_PEAK_DB = -1.0
ENERGY_FLOOR = 2e-3  # RMS; quieter sound counts as background noise, which `loudness` does not turn up
OFFSET_CEILING = 0.01  # to which a constant in the sound may be turned up with it
SILENCE = 2**-16  # peak; rounds to nothing in the 16 bits that are written
# Below the knee the limiter changes nothing. At full scale it takes away 0.42 dB: a signal that would
# have fitted without it does not lose half a LU to it.
KNEE = 0.8

HOP_S = 0.1  # gating blocks begin at every hop
BLOCK_HOPS = 4
ABSOLUTE_GATE_LUFS = -70.0
RELATIVE_GATE_LU = -10.0
CHUNK_HOPS = 50
WARM_UP_HOPS = 3  # the slower of the filters (38 Hz) has decayed by far more than 300 dB after this
FILTER_HEADROOM = 8.0  # torchaudio's filters clip at full scale, and raise treble by 4 dB


def normalize(
    samples: torch.Tensor, sample_rate: int, strategy: Strategy, *, tick: Tick = no_tick
) -> torch.Tensor:
    """Samples [C, T] float32, mono or stereo, of any level -> a new tensor [C, T] within [-1, 1]."""
    assert samples.dtype == torch.float32 and samples.ndim == 2 and samples.shape[0] in (1, 2)
    peak = _peak(samples)
    assert math.isfinite(peak), "samples must be finite"
    if peak < SILENCE:
        return samples.clone()
    if strategy == "clip":
        ceiling = _amplitude(TARGET_PEAK_DB)
        return samples.clamp(-ceiling, ceiling)
    if strategy == "peak":
        return samples * (_amplitude(TARGET_PEAK_DB) / peak)
    rms = _rms(samples)
    if strategy == "rms":
        # Half the channels' own level at least: only channels that mostly cancel fall below it.
        level = max(_rms(samples.mean(dim=0, keepdim=True)), rms / 2)
        return (samples * (_amplitude(TARGET_RMS_DB) / level)).clamp_(-1, 1)
    assert strategy == "loudness", strategy
    output = samples.clone()
    offset = _offset(samples)
    if rms**2 - float(offset.square().mean()) >= ENERGY_FLOOR**2:
        lufs = measure_lufs(samples, sample_rate, tick=tick)
        if lufs > ABSOLUTE_GATE_LUFS:
            gain = _amplitude(TARGET_LUFS - lufs)
            if gain > 1 and gain * float(offset.abs().max()) > OFFSET_CEILING:
                output -= offset.float()
            output *= gain
    _limit_(output)
    return output


def measure_lufs(samples: torch.Tensor, sample_rate: int, *, tick: Tick = no_tick) -> float:
    """Integrated loudness of samples [C, T], mono or stereo, by ITU-R BS.1770-4 with both gates.

    Filters and gates are those of `torchaudio.functional.loudness`, audiocraft's meter, but memory does
    not grow with the length, and loud treble is not clipped inside. A clip shorter than a gating block
    (0.4 s) is one block. -inf when no block reaches the absolute gate.
    """
    hop = round(HOP_S * sample_rate)
    headroom = FILTER_HEADROOM * max(1.0, _peak(samples))
    if samples.shape[1] < BLOCK_HOPS * hop:
        energy = _k_weighted(samples, sample_rate, headroom).square().mean(dim=1, keepdim=True)  # [C, 1]
    else:
        hops = torch.cat([*_hop_energies(samples, sample_rate, hop, headroom, tick)], dim=1)  # [C, hops]
        energy = hops.unfold(1, BLOCK_HOPS, 1).mean(dim=2)  # [C, blocks]
    blocks = energy.double().sum(dim=0) * headroom**2  # BS.1770 weighs left and right alike
    blocks = blocks[_lufs(blocks) > ABSOLUTE_GATE_LUFS]
    if not len(blocks):
        return -math.inf
    gate = _lufs(blocks.mean()) + RELATIVE_GATE_LU
    return float(_lufs(blocks[_lufs(blocks) > gate].mean()))


def _hop_energies(
    samples: torch.Tensor, sample_rate: int, hop: int, headroom: float, tick: Tick
) -> Iterator[torch.Tensor]:
    """Mean squares [C, up to CHUNK_HOPS] of the K-weighted samples, one for each whole hop."""
    total = samples.shape[1] // hop
    for first in range(0, total, CHUNK_HOPS):
        last = min(total, first + CHUNK_HOPS)
        start = max(0, first - WARM_UP_HOPS)
        weighted = _k_weighted(samples[:, start * hop : last * hop], sample_rate, headroom)
        yield weighted[:, (first - start) * hop :].square().view(len(samples), -1, hop).mean(dim=2)
        tick(last, total)


def _k_weighted(samples: torch.Tensor, sample_rate: int, headroom: float) -> torch.Tensor:
    """BS.1770's filters, a high shelf for the head and then a high pass, on samples / headroom."""
    shelved = treble_biquad(samples / headroom, sample_rate, 4.0, 1500.0, 1 / math.sqrt(2))
    weighted: torch.Tensor = highpass_biquad(shelved, sample_rate, 38.0, 0.5)
    return weighted


def _limit_(samples: torch.Tensor) -> None:
    """Bends what goes above the knee towards full scale, in place; smooth at the knee."""
    for chunk in _chunks(samples):
        above = chunk.abs() > KNEE
        high = chunk[above]
        chunk[above] = torch.copysign(KNEE + (1 - KNEE) * ((high.abs() - KNEE) / (1 - KNEE)).tanh(), high)


def _lufs(energy: torch.Tensor) -> torch.Tensor:
    return -0.691 + 10 * energy.log10()


def _amplitude(level_db: float) -> float:
    return float(10 ** (level_db / 20))


def _peak(samples: torch.Tensor) -> float:
    """NaN if any sample is."""
    if not samples.numel():
        return 0.0
    low, high = torch.aminmax(samples)
    return max(-float(low), float(high))


def _rms(samples: torch.Tensor) -> float:
    squares = [float(chunk.double().square().sum()) for chunk in _chunks(samples)]
    return math.sqrt(math.fsum(squares) / samples.numel())


def _offset(samples: torch.Tensor) -> torch.Tensor:
    """The mean of each channel: [C, 1], in double precision."""
    return (
        torch.stack([chunk.double().sum(1) for chunk in _chunks(samples)]).sum(0)[:, None] / samples.shape[1]
    )


def _chunks(samples: torch.Tensor) -> Iterator[torch.Tensor]:
    """Views of a few seconds each, so that what is computed from them stays small."""
    for start in range(0, samples.shape[1], 2**18):
        yield samples[:, start : start + 2**18]
