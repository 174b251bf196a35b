"""Sets the level of samples in one of four ways, as audiocraft's `normalize_audio` defines them.

| strategy   | result                                                          |
|------------|-----------------------------------------------------------------|
| `loudness` | -14 LUFS by ITU-R BS.1770-4, then limited softly                |
| `rms`      | -18 dBFS RMS of the mono downmix, then clipped at full scale    |
| `peak`     | highest sample at -1 dBFS                                       |
| `clip`     | level as it is, clipped at -1 dBFS                              |

Differences from audiocraft:

- `loudness` limits samples above a knee softly instead of clipping them.
- Silence stays silence; no level is divided by zero.
- A constant offset, which is inaudible, does not count as sound and is not amplified.
- A clip shorter than a gating block is measured as one block.
- A stereo signal whose channels cancel each other in the downmix is not amplified because of that.
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
ENERGY_FLOOR = 2e-3  # RMS; quieter sound counts as background noise, which `loudness` does not amplify
OFFSET_CEILING = 0.01  # the largest offset that an amplified signal may have; a larger one is subtracted
SILENCE = 2**-16  # peak; rounds to zero in the 16 bits that are written
# Below the knee the limiter changes nothing. At full scale it attenuates by 0.42 dB, so a signal that fits
# without the limiter loses less than 0.5 LU.
KNEE = 0.8

HOP_S = 0.1  # from the start of one gating block to the start of the next
BLOCK_HOPS = 4  # a gating block is 0.4 s
ABSOLUTE_GATE_LUFS = -70.0
RELATIVE_GATE_LU = -10.0
CHUNK_HOPS = 50  # filtered at once
WARM_UP_HOPS = 3  # after this the slower filter (38 Hz) has decayed by far more than 300 dB
FILTER_HEADROOM = 8.0  # torchaudio's filters clip at full scale, and they amplify treble by 4 dB


def normalize(
    samples: torch.Tensor, sample_rate: int, strategy: Strategy, *, tick: Tick = no_tick
) -> torch.Tensor:
    """Sets the level of samples; returns a new tensor [C, T] within [-1, 1].

    Args:
        samples: [C, T] float32, mono or stereo, of any finite level.
        sample_rate: in Hz.
        strategy: which level, see the module's table.
        tick: called while the loudness is measured; the other strategies take too little time.
    """
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
        # At least half the channels' own level: only channels that mostly cancel each other are below that.
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
    """Measures the integrated loudness in LUFS by ITU-R BS.1770-4, with both gates.

    Filters and gates are those of `torchaudio.functional.loudness`, which audiocraft uses, but memory does
    not grow with the length, and loud treble does not clip inside the filters.

    Args:
        samples: [C, T], mono or stereo. A clip shorter than a gating block (0.4 s) is one block.
        sample_rate: in Hz.
        tick: called with the number of hops (0.1 s) that are measured.

    Returns:
        LUFS; -inf if no block reaches the absolute gate.
    """
    hop = round(HOP_S * sample_rate)
    headroom = FILTER_HEADROOM * max(1.0, _peak(samples))
    if samples.shape[1] < BLOCK_HOPS * hop:
        energy = _k_weighted(samples, sample_rate, headroom).square().mean(dim=1, keepdim=True)  # [C, 1]
    else:
        hops = torch.cat([*_hop_energies(samples, sample_rate, hop, headroom, tick)], dim=1)  # [C, hops]
        energy = hops.unfold(1, BLOCK_HOPS, 1).mean(dim=2)  # [C, blocks]
    blocks = energy.double().sum(dim=0) * headroom**2  # BS.1770 gives left and right the weight 1
    blocks = blocks[_lufs(blocks) > ABSOLUTE_GATE_LUFS]
    if not len(blocks):
        return -math.inf
    gate = _lufs(blocks.mean()) + RELATIVE_GATE_LU
    return float(_lufs(blocks[_lufs(blocks) > gate].mean()))


def _hop_energies(
    samples: torch.Tensor, sample_rate: int, hop: int, headroom: float, tick: Tick
) -> Iterator[torch.Tensor]:
    """Yields the mean square of the K-weighted samples in each whole hop: [C, up to CHUNK_HOPS]."""
    total = samples.shape[1] // hop
    for first in range(0, total, CHUNK_HOPS):
        last = min(total, first + CHUNK_HOPS)
        start = max(0, first - WARM_UP_HOPS)
        weighted = _k_weighted(samples[:, start * hop : last * hop], sample_rate, headroom)
        yield weighted[:, (first - start) * hop :].square().view(len(samples), -1, hop).mean(dim=2)
        tick(last, total)


def _k_weighted(samples: torch.Tensor, sample_rate: int, headroom: float) -> torch.Tensor:
    """Applies the K-weighting of BS.1770 to samples / headroom: [C, T] -> [C, T].

    It is a high shelf, which models the head, and then a high pass.
    """
    shelved = treble_biquad(samples / headroom, sample_rate, 4.0, 1500.0, 1 / math.sqrt(2))
    weighted: torch.Tensor = highpass_biquad(shelved, sample_rate, 38.0, 0.5)
    return weighted


def _limit_(samples: torch.Tensor) -> None:
    """Limits samples [C, T] in place to full scale, by a tanh above the knee that is smooth at the knee."""
    for chunk in _chunks(samples):
        above = chunk.abs() > KNEE
        high = chunk[above]
        chunk[above] = torch.copysign(KNEE + (1 - KNEE) * ((high.abs() - KNEE) / (1 - KNEE)).tanh(), high)


def _lufs(energy: torch.Tensor) -> torch.Tensor:
    """Converts K-weighted mean squares, summed over the channels, to LUFS (BS.1770-4, equation 2)."""
    return -0.691 + 10 * energy.log10()


def _amplitude(level_db: float) -> float:
    """Converts decibels to a factor of the amplitude."""
    return float(10 ** (level_db / 20))


def _peak(samples: torch.Tensor) -> float:
    """Returns the largest absolute sample, 0 if there is none, NaN if any sample is NaN."""
    if not samples.numel():
        return 0.0
    low, high = torch.aminmax(samples)
    return max(-float(low), float(high))


def _rms(samples: torch.Tensor) -> float:
    """Returns the root mean square over all channels, computed in double precision."""
    squares = [float(chunk.double().square().sum()) for chunk in _chunks(samples)]
    return math.sqrt(math.fsum(squares) / samples.numel())


def _offset(samples: torch.Tensor) -> torch.Tensor:
    """Returns the mean of each channel: [C, 1] float64."""
    return (
        torch.stack([chunk.double().sum(1) for chunk in _chunks(samples)]).sum(0)[:, None] / samples.shape[1]
    )


def _chunks(samples: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yields views of a few seconds each, so that what is computed from each of them stays small."""
    for start in range(0, samples.shape[1], 2**18):
        yield samples[:, start : start + 2**18]
