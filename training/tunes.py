"""The demo model's music: eight melodies in the public domain, typed in by hand, and tunes for its tests.

A melody is written as notes and beats: `c` is C5, `c,` is an octave lower, `c'` an octave higher, `#` is
sharp; `:2` lasts two beats, without a number it is one. The keys are chosen so that most notes are between C5
and B5, as in the random tunes that the codec is trained on, and none is above C6, because the codec changes
the pitch of higher notes. No tune has a rest: the note before it is held instead, so that there is always a
note whose age can be told from the sound.
"""

import random
from dataclasses import dataclass

type Notes = tuple[tuple[int, float], ...]
"""A sequence of (MIDI pitch, beats)."""

_STEPS = {"c": 0, "d": 2, "e": 4, "f": 5, "g": 7, "a": 9, "b": 11}
C5 = 72


@dataclass(frozen=True)
class Tune:
    """A melody with its name in lower case."""

    name: str
    notes: Notes

    @property
    def beats(self) -> float:
        """The length in beats."""
        return sum(beats for _, beats in self.notes)


def parse(text: str) -> Notes:
    """Parses a melody in the notation above, such as `"c d:2 g,:.5"`."""
    notes = []
    for word in text.split():
        pitch, _, beats = word.partition(":")
        octave = pitch.count("'") - pitch.count(",")
        midi = C5 + _STEPS[pitch[0]] + 12 * octave + pitch.count("#")
        notes.append((midi, float(beats or 1)))
    return tuple(notes)


SONGS = tuple(
    Tune(name, parse(text))
    for name, text in {
        "ode to joy": """
            e e f g  g f e d  c c d e  e:1.5 d:.5 d:2
            e e f g  g f e d  c c d e  d:1.5 c:.5 c:2
            d d e c  d e:.5 f:.5 e c  d e:.5 f:.5 e d  c d g,:2
            e e f g  g f e d  c c d e  d:1.5 c:.5 c:2""",
        "twinkle twinkle": """
            c c g g  a a g:2  f f e e  d d c:2
            g g f f  e e d:2  g g f f  e e d:2
            c c g g  a a g:2  f f e e  d d c:2""",
        "frere jacques": """
            c d e c  c d e c  e f g:2  e f g:2
            g:.5 a:.5 g:.5 f:.5 e c  g:.5 a:.5 g:.5 f:.5 e c  c g, c:2  c g, c:2""",
        "when the saints": """
            c e f  g:5  c e f  g:5  c e f  g:2 e:2  c:2 e:2  d:5  e e d
            c:3 c  e:2 g g  f:6  e f  g:2 e:2  c:2 d:2  c:5""",
        "jingle bells": """
            e e e:2  e e e:2  e g c:1.5 d:.5  e:4
            f f f:1.5 f:.5  f e e e:.5 e:.5  e d d e  d:2 g:2
            e e e:2  e e e:2  e g c:1.5 d:.5  e:4
            f f f:1.5 f:.5  f e e e:.5 e:.5  g g f d  c:4""",
        "amazing grace": """
            c  f:2 a:.5 f:.5  a:2 g  f:2 d  c:2 c  f:2 a:.5 f:.5  a:2 g  c':5
            a  c':1.5 a:.5 c':.5 a:.5  f:2 c  d:1.5 f:.5 f:.5 d:.5  c:2 c
            f:2 a:.5 f:.5  a:2 g  f:5""",
        "greensleeves": """
            e  g:2 a  b:1.5 c':.5 b  a:2 f#  d:1.5 e:.5 f#  g:2 e  e:1.5 d#:.5 e  f#:2 d#  b,:2 e
            g:2 a  b:1.5 c':.5 b  a:2 f#  d:1.5 e:.5 f#  g:1.5 f#:.5 e  d#:1.5 c#:.5 d#  e:3  e:2""",
        "auld lang syne": """
            a#,  d#:1.5 d#:.5 d# g  f:1.5 d#:.5 f g  d#:1.5 d#:.5 g a#  c':3 c'
            a#:1.5 g:.5 g d#  f:1.5 d#:.5 f g  d#:1.5 c:.5 c a#,  d#:3 c'
            a#:1.5 g:.5 g d#  f:1.5 d#:.5 f c'  a#:1.5 g:.5 g a#  c':3 c'
            a#:1.5 g:.5 g d#  f:1.5 d#:.5 f g  d#:1.5 c:.5 c a#,  d#:3""",
    }.items()
)

UNSEEN = tuple(
    Tune(name, parse(text))
    for name, text in {
        "mary had a little lamb": "e d c d  e e e:2  d d d:2  e g g:2",
        "london bridge": "g:1.5 a:.5 g f  e f g:2  d e f:2  e f g:2",
        "row your boat": "c:1.5 c:1.5 c d:.5 e:1.5 e d:.5 e f:.5 g:3 g:2",
        "yankee doodle": "c c d e  c e d:2  c c d e  c:2 b,:2",
        "old macdonald": "g g g d  e e d:2  b b a a  g:4",
        "hot cross buns": "e:2 d:2  c:4  c:.5 c:.5 c:.5 c:.5 d:.5 d:.5 d:.5 d:.5  e d c:2",
        "silent night": "g:1.5 a:.5 g  e:3  g:1.5 a:.5 g  e:3  b:2 b  g:3",
        "oh susanna": "c:.5 d:.5 e g g:1.5 a:.5 g e c:1.5 d:.5 e e d c d:3",
        "clementine": "f:.5 f:.5 f c f:.5 a:.5 a a:.5 f:.5 f:.5 a:.5 a:1.5 g:.5 f g:3",
        "skip to my lou": "e e c c  e e:.5 e:.5 g:2  d d b, b,  d d:.5 d:.5 f:2",
    }.items()
)
"""Tunes for the evaluation; none of them is in the training data."""

SCALES = ((0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10), (0, 2, 4, 7, 9), tuple(range(12)))
FIGURES = ((1.0,), (1.0,), (1.0,), (2.0,), (0.5, 0.5), (0.5, 0.5), (1.5, 0.5), (3.0,))


def random_tune(seed: str, beats: float) -> Tune:
    """Draws a melody of at least `beats` beats from C5 to B5: a random walk on a scale, in simple rhythms."""
    draw = random.Random(seed)
    root = draw.randrange(12)
    scale = sorted({C5 + (root + step) % 12 for step in draw.choice(SCALES)})
    at = draw.randrange(len(scale))
    notes: list[tuple[int, float]] = []
    length = 0.0
    while length < beats:
        for duration in draw.choice(FIGURES):
            notes.append((scale[at], duration))
            length += duration
            leap = draw.choice((0, 1, 1, 1, 2, 2, 3, 5))
            at = (at + draw.choice((-leap, leap))) % len(scale)
    return Tune(seed, tuple(notes))
