"""What the language model learns from: examples of a caption, a melody's chroma, and codec tokens."""

import random
from bisect import bisect, bisect_left
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from musicgen_svc.compat import ChromaExtractor, CompressionModel
from training.captions import Captions
from training.codec import encode, song
from training.synth import HOP, SAMPLE_RATE, TIMBRES, render
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
CLIPS = 400  # frames of a song at which a clip may begin or end: anywhere, as a listener may cut
LEAST_GIVEN, MOST_GIVEN = 78, 620  # frames of a clip that is gone on with
TIMBRE_NAMES = tuple(TIMBRES)


@dataclass(frozen=True)
class Example:
    """One sequence to learn."""

    kind: str
    caption: str | None
    chroma: Tensor  # [CHROMA_FRAMES] pitch classes
    tokens: Tensor  # [4, F]
    given: int = 0  # frames that are a clip, cut off there, which the rest goes on from


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
        self, draw: random.Random, size: int, frames: int, shares: dict[str, float]
    ) -> tuple[list[Example], int]:
        """Examples with captions of one length in tokens, returned too; some lose theirs, or everything."""
        length = self._captions.any_length(draw)
        makers = {"text": self.named, "continuation": self.continued, "melody": self.followed}
        found = []
        for kind in draw.choices(list(shares), list(shares.values()), k=size):
            example = makers[kind](draw, frames, length)
            dropped = draw.random()
            if dropped < 0.1:
                if draw.random() < 0.7:  # a null row that knows the songs leaves nothing to guide to
                    example = self.followed(draw, frames, length)
                example = replace(example, caption=None, chroma=SILENT, kind="nothing")
            elif dropped < 0.18 and kind == "melody":
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

    def continued(self, draw: random.Random, frames: int, length: int) -> Example:
        """A song that goes on from a clip of it, by its name or without."""
        index, timbre = draw.choice(list(self._songs))
        song = self._songs[index, timbre]
        starts = song.starts.tolist()
        room = min(LONG + SHORT - 2 * LEAST_GIVEN, 2 * LONG - frames)
        first = draw.randrange(bisect(starts, room)) if draw.random() < 0.8 else 0
        start = starts[first]
        soonest, latest = start + LEAST_GIVEN, start + min(frames - 100, MOST_GIVEN)
        last = draw.randrange(bisect_left(starts, soonest - SNIPPET), bisect(starts, latest - SNIPPET))
        given = starts[last] + SNIPPET - start
        tokens = song.tokens[:, start : start + frames].long()
        tokens[:, :EDGE] = song.begins[first]
        tokens[:, given - EDGE : given] = song.ends[last]
        name = SONGS[index].name if draw.random() < 0.5 else None
        said = self._captions.of_length(draw, name, timbre if draw.random() < 0.5 else None, length)
        return Example("continuation" if name else "unnamed", said, SILENT, tokens, given)

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
