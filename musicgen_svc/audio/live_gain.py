"""Sets the level of audio that is played while it is generated, from what has been generated so far.

The loudness of a piece is only known at its end. Until then the gain approaches, slowly, the level that the
audio so far would need, so that no change of it is heard as such; and a limiter bends peaks that the slow
gain cannot foresee. The file that a request returns is not changed by this: `loudness.py` sets its level.
"""

import math

import torch
from torch import Tensor

TARGET_RMS_DB = -17.0
"""The level that the gain aims at, in dB of full scale: music of -14 LUFS has about this RMS."""
CEILING_DB = -1.0
"""The level that the highest peak so far may reach by the gain."""
GAIN_DB = 12.0
"""The gain is at most this and at least minus this, so that noise is not raised to music."""
RATE_DB_S = 3.0
"""How fast the gain may change."""
SILENCE_RMS_DB = -50.0
"""Parts below this level do not count."""
KNEE, LIMIT = 0.9, 0.999
"""Samples up to the knee pass the limiter unchanged; none reaches the limit."""


class LiveGain:
    """The gain of one piece of audio, which comes in parts. It depends on no later part."""

    def __init__(self, sample_rate: int) -> None:
        """Makes the gain of audio that has not begun. `sample_rate`: in Hz."""
        self._step_db = RATE_DB_S / sample_rate
        self._gain_db: float | None = None
        self._power, self._counted, self._peak = 0.0, 0, 0.0

    def apply(self, samples: Tensor) -> Tensor:
        """Returns the next part of the audio at its level: [C, T] -> [C, T] in (-1, 1)."""
        return limited(samples * 10 ** (self.gains_db(samples) / 20))

    def gains_db(self, samples: Tensor) -> Tensor:
        """Measures the next part of the audio [C, T], and returns the gain of each sample: [T] in dB.

        The first part is played with the gain that it needs itself. From then on the gain moves towards what
        all parts so far need, by at most RATE_DB_S.
        """
        assert samples.ndim == 2 and samples.shape[1] > 0, samples.shape
        self._measure(samples)
        wanted = self._wanted_db()
        start = wanted if self._gain_db is None else self._gain_db
        steps = torch.arange(1, samples.shape[1] + 1, dtype=torch.float64) * self._step_db
        moved = steps.clamp(max=abs(wanted - start)) * math.copysign(1.0, wanted - start)
        gains = start + moved
        self._gain_db = float(gains[-1])
        return gains.to(samples.dtype)

    def _measure(self, samples: Tensor) -> None:
        """Adds a part to the power and the peak of the audio so far."""
        power = float(samples.double().pow(2).mean())
        if power > 10 ** (SILENCE_RMS_DB / 10):
            self._power += power * samples.shape[1]
            self._counted += samples.shape[1]
        self._peak = max(self._peak, float(samples.abs().max()))

    def _wanted_db(self) -> float:
        """Returns the gain that the audio so far would need."""
        if self._counted == 0:
            return min(0.0, self._headroom_db())
        rms_db = 10 * math.log10(self._power / self._counted)
        return max(-GAIN_DB, min(TARGET_RMS_DB - rms_db, self._headroom_db(), GAIN_DB))

    def _headroom_db(self) -> float:
        """Returns the gain that would bring the highest peak to the ceiling."""
        return CEILING_DB - 20 * math.log10(self._peak) if self._peak > 0 else GAIN_DB


def limited(samples: Tensor) -> Tensor:
    """Bends what is above the knee, smoothly and without memory, so that no sample reaches the limit."""
    size = samples.abs()
    room = LIMIT - KNEE
    bent = KNEE + room * torch.tanh((size - KNEE) / room)
    return torch.where(size <= KNEE, samples, bent.copysign(samples))
