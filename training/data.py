"""What the language model learns from: examples of a caption, a melody's chroma, and codec tokens."""

import random
from bisect import bisect, bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from musicgen_svc.audiocraft_compat import ChromaExtractor, CompressionModel
from training.captions import Captions
from training.codec import encode, song
from training.synth import BEAT_FRAMES, HOP, SAMPLE_RATE, TIMBRES, render
from training.tunes import SONGS, random_tune

WINDOW_S = 30.0
RADIX = 12  # the chroma's window of 2^12 samples, 0.13 s
CHROMA_HOP = 4 * HOP  # 12.5 chroma frames a second: every fourth codec frame
CHROMA_FRAMES = 1 + int(WINDOW_S * SAMPLE_RATE) // CHROMA_HOP
SHORT, LONG = 400, 1500  # frames
SILENT = torch.zeros(CHROMA_FRAMES, dtype=torch.int8)
"""The chroma of no melody: silence gives pitch class 0 throughout."""

EDGE = 10  # frames that know, by the codec's zero padding, that a clip begins or ends there
SNIPPET = 24
CLIPS = 900  # frames of a song at which a clip may begin or end: anywhere, as a listener may cut
LEAST_GIVEN, LEAST_NEW = 78, 100  # frames of a clip that is gone on with, and of what follows it
APART = 48  # frames at least between one cut and the next
BEFORE_BEAT = 3  # frames, from which on the codec's tokens tell what the next beat brings
TIMBRE_NAMES = tuple(TIMBRES)


@dataclass(frozen=True)
class Example:
    """One sequence to learn."""

    kind: str
    caption: str | None
    chroma: Tensor  # [CHROMA_FRAMES] pitch classes
    tokens: Tensor  # [4, F]
    cuts: tuple[int, ...] = ()  # frames before which a clip ends, and from which it is gone on with


@dataclass(frozen=True)
class Shares:
    """How many examples are of which kind, as weights; and of all of them:"""

    text: float
    continuation: float
    melody: float
    nothing: float = 0.1
    """How many have nothing to go by, which guidance leads away from."""
    known: float = 0.3
    """How many of those are songs: a null row that knows them well leaves nothing to guide to."""


@dataclass(frozen=True)
class Song:
    """One of the eight in one timbre, as tokens."""

    tokens: Tensor  # [4, 2 * LONG], over and over from its first note
    starts: Tensor  # [CLIPS], in order: where the clips begin whose ends follow
    begins: Tensor  # [CLIPS, 4, EDGE]: a clip's first frames
    ends: Tensor  # [CLIPS, 4, EDGE]: the last frames of one that ends SNIPPET frames later


@dataclass(frozen=True)
class Melody:
    """A random tune: what one timbre's rendering sounds like, and another's tokens."""

    timbre: str
    chroma: Tensor  # [CHROMA_FRAMES]
    tokens: Tensor  # [4, F]


@torch.inference_mode()
def encoded_song(codec: CompressionModel, index: int, timbre: str) -> Song:
    wav = song(index, timbre, 2 * LONG)
    starts = [0, *sorted(random.Random(f"{index} {timbre}").sample(range(1, LONG + SHORT), CLIPS - 1))]
    clips = torch.stack([wav[start * HOP : (start + SNIPPET) * HOP] for start in starts])
    cut = torch.cat([codec.encode(some[:, None])[0] for some in torch.split(clips, 64)]).short()
    tokens = encode(codec, wav)[:, : 2 * LONG].short()
    return Song(tokens, torch.tensor(starts), cut[..., :EDGE].clone(), cut[..., -EDGE:].clone())


def encoded_melody(codec: CompressionModel, chroma: ChromaExtractor, name: str, frames: int) -> Melody:
    draw = random.Random(name)
    notes = random_tune(name, frames / 24 + 2).notes
    timbre = draw.choice(TIMBRE_NAMES)
    octave = 12 * draw.randrange(2)  # chroma cannot tell
    lower = tuple((pitch - octave, beats) for pitch, beats in notes)
    skip = draw.randrange(24) * HOP if draw.random() < 0.4 else 0  # clips need not begin on a beat
    part = slice(skip, skip + frames * HOP)
    heard = pitch_classes(chroma, render(lower, draw.choice(TIMBRE_NAMES))[part])
    return Melody(timbre, heard, encode(codec, render(notes, timbre)[part]).short())


def chroma_extractor() -> ChromaExtractor:
    """Chroma as the exported configuration asks for it."""
    return ChromaExtractor(
        sample_rate=SAMPLE_RATE, n_chroma=12, radix2_exp=RADIX, winhop=CHROMA_HOP, argmax=True
    )


@torch.inference_mode()
def pitch_classes(chroma: ChromaExtractor, wav: Tensor) -> Tensor:
    """[T] -> [CHROMA_FRAMES]: repeated or cut, as MusicGen does with a clip of any length."""
    found = chroma(wav[None, None])[0].argmax(-1).to(torch.int8)
    repeated: Tensor = found.repeat(-(-CHROMA_FRAMES // len(found)))
    return repeated[:CHROMA_FRAMES].clone()


class Lessons:
    """Examples of three kinds: songs by name, songs that go on, melodies that are followed."""

    def __init__(
        self, songs: dict[tuple[int, str], Song], melodies: list[Melody], captions: Captions
    ) -> None:
        self._songs, self._captions = songs, captions
        self._short = [melody for melody in melodies if melody.tokens.shape[1] < LONG]
        self._long = [melody for melody in melodies if melody.tokens.shape[1] >= LONG]

    def batch(
        self, draw: random.Random, size: int, frames: int, shares: Shares, cuts: int = 1
    ) -> tuple[list[Example], int]:
        """Examples with captions of one length in tokens, returned too; some lose theirs, or everything.

        A clip is cut off at `cuts` places at most.
        """
        length = self._captions.any_length(draw)
        makers: dict[str, Callable[[random.Random, int, int], Example]] = {
            "text": self.named,
            "continuation": partial(self.continued, cuts=cuts),
            "melody": self.followed,
        }
        kinds = {"text": shares.text, "continuation": shares.continuation, "melody": shares.melody}
        found = []
        for kind in draw.choices(list(kinds), list(kinds.values()), k=size):
            example = makers[kind](draw, frames, length)
            dropped = draw.random()
            if dropped < shares.nothing:
                if draw.random() >= shares.known:
                    example = self.followed(draw, frames, length)
                example = replace(example, caption=None, chroma=SILENT, kind="nothing")
            elif dropped < shares.nothing + 0.08 and kind == "melody":
                example = replace(example, caption=None)
            found.append(example)
        return found, length

    def named(self, draw: random.Random, frames: int, length: int) -> Example:
        """A song from its first note, by its name."""
        index, timbre = draw.choice(list(self._songs))
        said = self._captions.of_length(
            draw, SONGS[index].name, timbre if draw.random() < 0.75 else None, length
        )
        return Example("text", said, SILENT, self._songs[index, timbre].tokens[:, :frames].long())

    def continued(self, draw: random.Random, frames: int, length: int, cuts: int = 1) -> Example:
        """A song that goes on from a clip of it, by its name or without.

        The codec cannot look ahead where a clip ends, and its tokens are others there. Several cuts make
        several lessons of one example: what comes before each of them is cut off, and then it goes on.
        Half of them are at the end of a beat, where nothing yet tells the next note but the song.
        """
        index, timbre = draw.choice(list(self._songs))
        song = self._songs[index, timbre]
        starts = song.starts.tolist()
        room = min(LONG + SHORT - 2 * LEAST_GIVEN, 2 * LONG - frames)
        first = draw.randrange(bisect(starts, room)) if draw.random() < 0.8 else 0
        start = starts[first]
        soonest, latest = start + LEAST_GIVEN, start + frames - LEAST_NEW
        ends = range(bisect_left(starts, soonest - SNIPPET), bisect(starts, latest - SNIPPET))
        tokens = song.tokens[:, start : start + frames].long()
        tokens[:, :EDGE] = song.begins[first]
        found: list[int] = []
        beat_ends = [end for end in ends if -(starts[end] + SNIPPET) % BEAT_FRAMES <= BEFORE_BEAT]
        for _ in range(cuts):
            end = draw.choice(beat_ends if beat_ends and draw.random() < 0.5 else ends)
            cut = starts[end] + SNIPPET - start
            if all(abs(cut - other) >= APART for other in found):
                tokens[:, cut - EDGE : cut] = song.ends[end]
                found.append(cut)
        name = SONGS[index].name if draw.random() < 0.5 else None
        said = self._captions.of_length(draw, name, timbre if draw.random() < 0.5 else None, length)
        return Example("continuation" if name else "unnamed", said, SILENT, tokens, tuple(sorted(found)))

    def followed(self, draw: random.Random, frames: int, length: int) -> Example:
        """A melody that is heard, in a timbre that is named or not."""
        melody = draw.choice(self._short if frames <= SHORT else self._long)
        said = self._captions.of_length(draw, None, melody.timbre if draw.random() < 0.85 else None, length)
        heard = melody.chroma
        if draw.random() < 0.5:  # the chroma of recordings is not clean
            heard = heard.clone()
            wrong = torch.rand(len(heard)) < draw.uniform(0, 0.12)
            heard[wrong] = torch.randint(12, (int(wrong.sum()),), dtype=heard.dtype)
        return Example("melody", said, heard, melody.tokens[:, :frames].long())
