"""Notes -> samples: three struck timbres on a fixed grid of codec frames.

A model of 50 frames a second has to know how long a note has lasted, or it cannot end it. So every
timbre decays, a long note is struck again on each of its beats, softer each time, and every onset falls on
a frame: how far a note has come can then be heard in any frame of it.
"""

import torch
from torch import Tensor

from training.tunes import Notes

SAMPLE_RATE = 32_000
HOP = 640  # samples a codec frame
BEAT_FRAMES = 24  # 0.48 s: 125 beats a minute; an eighth is 12 frames
ECHO = 0.65  # a strike's level to the one a beat before
FADE_S = 0.008
LEVEL = 0.5

TIMBRES: dict[str, tuple[dict[int, float], float, float]] = {
    # name: levels of the harmonics, decay time in s, how much faster higher harmonics decay
    "music box": ({1: 1.25, 4: 0.6, 8: 0.25}, 0.16, 0.5),
    "harp": ({1: 1.1, 2: 0.5, 3: 0.2}, 0.20, 0.35),
    "piano": ({1: 0.65, 2: 0.6, 3: 0.45, 4: 0.35, 5: 0.22, 6: 0.15}, 0.24, 0.25),
}


def render(notes: Notes, timbre: str) -> Tensor:
    """Samples [T] at 32 kHz, `BEAT_FRAMES` frames a beat."""
    return torch.cat([_strike(pitch, beats, level, timbre) for pitch, beats, level in strikes(notes)])


def strikes(notes: Notes) -> list[tuple[int, float, float]]:
    """Notes -> (pitch, beats, level): one for each beat that a note lasts."""
    found = []
    for pitch, beats in notes:
        level = LEVEL
        while beats > 0:
            found.append((pitch, min(beats, 1.0), level))
            beats, level = beats - 1, level * ECHO
    return found


def _strike(pitch: int, beats: float, level: float, timbre: str) -> Tensor:
    harmonics, decay_s, spread = TIMBRES[timbre]
    samples = round(beats * BEAT_FRAMES) * HOP
    time_s = torch.arange(samples) / SAMPLE_RATE
    frequency_hz = 440 * 2 ** ((pitch - 69) / 12)
    tone = torch.zeros(samples)
    for number, loud in harmonics.items():
        decay = torch.exp(-time_s / decay_s * (1 + spread * (number - 1)))
        tone += loud * decay * torch.sin(2 * torch.pi * frequency_hz * number * time_s)
    fade = (time_s / FADE_S).clamp(max=1) * (time_s.flip(0) / FADE_S).clamp(max=1)
    return level * fade * tone


def looped(notes: Notes, frames: int) -> Notes:
    """The tune over and over, until it lasts `frames` or longer."""
    beats = sum(length for _, length in notes)
    return notes * -(-frames // round(beats * BEAT_FRAMES))


def pitches(notes: Notes) -> Tensor:
    """The MIDI pitch that sounds in each codec frame, [F]."""
    return torch.cat([torch.full((round(beats * BEAT_FRAMES),), pitch) for pitch, beats in notes])
