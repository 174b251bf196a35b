"""Renders notes to samples, in three struck timbres on a fixed grid of codec frames.

The language model, with 50 frames a second, must be able to tell from any frame how long a note has lasted,
or it cannot end the note. So every timbre decays, a long note is struck again on each of its beats, softer
each time, and every onset is at the start of a frame.
"""

import torch
from torch import Tensor

from training.tunes import Notes

SAMPLE_RATE = 32_000
HOP = 640  # samples per codec frame
BEAT_FRAMES = 24  # 0.48 s: 125 beats a minute; an eighth note has 12 frames
STRIKE_DECAY = 0.65  # the factor from the level of one strike to that of the next in the same note
FADE_S = 0.008
LEVEL = 0.5

TIMBRES: dict[str, tuple[dict[int, float], float, float]] = {
    # name: levels of the harmonics, decay time in s, how much faster higher harmonics decay
    "music box": ({1: 1.25, 4: 0.6, 8: 0.25}, 0.16, 0.5),
    "harp": ({1: 1.1, 2: 0.5, 3: 0.2}, 0.20, 0.35),
    "piano": ({1: 0.65, 2: 0.6, 3: 0.45, 4: 0.35, 5: 0.22, 6: 0.15}, 0.24, 0.25),
}


def render(notes: Notes, timbre: str) -> Tensor:
    """Renders notes: samples [T] at 32 kHz, `BEAT_FRAMES` frames per beat."""
    return torch.cat([_strike(pitch, beats, level, timbre) for pitch, beats, level in strikes(notes)])


def strikes(notes: Notes) -> list[tuple[int, float, float]]:
    """Returns the strikes of notes, one per beat of a note: (MIDI pitch, beats, level)."""
    found = []
    for pitch, beats in notes:
        level = LEVEL
        while beats > 0:
            found.append((pitch, min(beats, 1.0), level))
            beats, level = beats - 1, level * STRIKE_DECAY
    return found


def _strike(pitch: int, beats: float, level: float, timbre: str) -> Tensor:
    """Renders one strike: samples [T]."""
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
    """Repeats a tune until it has at least `frames` codec frames."""
    beats = sum(length for _, length in notes)
    return notes * -(-frames // round(beats * BEAT_FRAMES))


def pitches(notes: Notes) -> Tensor:
    """Returns the MIDI pitch in each codec frame, [F]."""
    return torch.cat([torch.full((round(beats * BEAT_FRAMES),), pitch) for pitch, beats in notes])
