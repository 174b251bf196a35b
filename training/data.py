"""Training data of the language model: examples of a caption, a melody's chroma, and codec tokens."""

import random
from bisect import bisect, bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from musicgen_svc.audiocraft_compat import ChromaExtractor, CompressionModel
from training.captions import Captions
from training.codec import encode, song_samples
from training.synth import BEAT_FRAMES, HOP, SAMPLE_RATE, TIMBRES, render
from training.tunes import SONGS, random_tune

WINDOW_S = 30.0
CHROMA_RADIX = 12  # a window of the chroma has 2^12 samples, 0.13 s
CHROMA_HOP = 4 * HOP  # samples: 12.5 chroma frames a second, one for every four codec frames
CHROMA_FRAMES = 1 + int(WINDOW_S * SAMPLE_RATE) // CHROMA_HOP
SHORT_FRAMES, LONG_FRAMES = 400, 1500  # the lengths of examples: 8 s and a whole window
NULL_CHROMA = torch.zeros(CHROMA_FRAMES, dtype=torch.int8)
"""The chroma of no melody: pitch class 0 in every frame, as silence has."""

EDGE_FRAMES = 10  # codec frames on which the codec's zero padding at the edge of a clip has an effect
SNIPPET_FRAMES = 24  # the clips that are encoded to get the tokens at edges
CLIPS_PER_SONG = 900  # positions in a song at which a clip may begin or end
MIN_GIVEN_FRAMES, MIN_NEW_FRAMES = 78, 100  # of the clip of a continuation, and of what follows it
MIN_CUT_DISTANCE = 48  # frames from one cut to the next
BEFORE_BEAT_FRAMES = 3  # before a beat; from there on the codec's tokens tell what comes with the beat
TIMBRE_NAMES = tuple(TIMBRES)


@dataclass(frozen=True)
class Example:
    """One training sequence."""

    mode: str
    """`text`, `continuation`, `unnamed` (a continuation whose caption names no song), `melody` or `null`."""
    caption: str | None
    chroma: Tensor  # [CHROMA_FRAMES] pitch classes
    tokens: Tensor  # [4, F]
    cuts: tuple[int, ...] = ()  # frames at which a clip ends and its continuation begins


@dataclass(frozen=True)
class Shares:
    """How many examples there are of each mode, as weights."""

    text: float
    continuation: float
    melody: float
    null: float = 0.1
    """The part of all examples that lose their conditions, for classifier-free guidance."""
    null_songs: float = 0.3
    """The part of those that may be songs; the others are random tunes. If the model knows the songs well
    without conditions, guidance has no effect."""


@dataclass(frozen=True)
class SongTokens:
    """The tokens of one of the eight songs in one timbre."""

    tokens: Tensor  # [4, 2 * LONG_FRAMES], the song repeated from its first note
    starts: Tensor  # [CLIPS_PER_SONG], sorted: the frames at which the clips of the next two fields begin
    first_tokens: Tensor  # [CLIPS_PER_SONG, 4, EDGE_FRAMES]: the first frames of a clip
    last_tokens: Tensor  # [CLIPS_PER_SONG, 4, EDGE_FRAMES]: the last frames of a clip of SNIPPET_FRAMES


@dataclass(frozen=True)
class MelodyTokens:
    """A random tune: the chroma of its rendering in one timbre, and the tokens of that in another."""

    timbre: str
    chroma: Tensor  # [CHROMA_FRAMES]
    tokens: Tensor  # [4, F]


@torch.inference_mode()
def encoded_song(codec: CompressionModel, index: int, timbre: str) -> SongTokens:
    """Renders one of the eight songs and encodes it, and the clips of it."""
    wav = song_samples(index, timbre, 2 * LONG_FRAMES)
    positions = range(1, LONG_FRAMES + SHORT_FRAMES)
    starts = [0, *sorted(random.Random(f"{index} {timbre}").sample(positions, CLIPS_PER_SONG - 1))]
    clips = torch.stack([wav[start * HOP : (start + SNIPPET_FRAMES) * HOP] for start in starts])
    cut = torch.cat([codec.encode(some[:, None])[0] for some in torch.split(clips, 64)]).short()
    tokens = encode(codec, wav)[:, : 2 * LONG_FRAMES].short()
    return SongTokens(
        tokens, torch.tensor(starts), cut[..., :EDGE_FRAMES].clone(), cut[..., -EDGE_FRAMES:].clone()
    )


def encoded_melody(codec: CompressionModel, chroma: ChromaExtractor, name: str, frames: int) -> MelodyTokens:
    """Renders the random tune of the seed `name` in two timbres, and encodes it: `frames` frames."""
    draw = random.Random(name)
    notes = random_tune(name, frames / 24 + 2).notes
    timbre = draw.choice(TIMBRE_NAMES)
    octave = 12 * draw.randrange(2)  # has no effect on the chroma's pitch classes
    lower = tuple((pitch - octave, beats) for pitch, beats in notes)
    skip = draw.randrange(24) * HOP if draw.random() < 0.4 else 0  # a clip may begin between two beats
    part = slice(skip, skip + frames * HOP)
    classes = pitch_classes(chroma, render(lower, draw.choice(TIMBRE_NAMES))[part])
    return MelodyTokens(timbre, classes, encode(codec, render(notes, timbre)[part]).short())


def chroma_extractor() -> ChromaExtractor:
    """Returns an extractor with the settings of the exported configuration."""
    return ChromaExtractor(
        sample_rate=SAMPLE_RATE, n_chroma=12, radix2_exp=CHROMA_RADIX, winhop=CHROMA_HOP, argmax=True
    )


@torch.inference_mode()
def pitch_classes(chroma: ChromaExtractor, wav: Tensor) -> Tensor:
    """Returns the loudest pitch class of each frame: [T] -> [CHROMA_FRAMES].

    It is repeated or cut to that length, as MusicGen does with a clip of any length.
    """
    found = chroma(wav[None, None])[0].argmax(-1).to(torch.int8)
    repeated: Tensor = found.repeat(-(-CHROMA_FRAMES // len(found)))
    return repeated[:CHROMA_FRAMES].clone()


class ExampleSampler:
    """Draws examples of three modes: songs by name, continued songs, and melodies to follow."""

    def __init__(
        self, songs: dict[tuple[int, str], SongTokens], melodies: list[MelodyTokens], captions: Captions
    ) -> None:
        """Keeps the tokens. `songs` are by index and timbre; `melodies` are of both lengths."""
        self._songs, self._captions = songs, captions
        self._short = [melody for melody in melodies if melody.tokens.shape[1] < LONG_FRAMES]
        self._long = [melody for melody in melodies if melody.tokens.shape[1] >= LONG_FRAMES]

    def batch(
        self, draw: random.Random, size: int, frames: int, shares: Shares, max_cuts: int = 1
    ) -> tuple[list[Example], int]:
        """Draws examples, some of which lose their caption or all conditions.

        Args:
            draw: the generator.
            size: how many examples.
            frames: the length of each, `SHORT_FRAMES` or `LONG_FRAMES`.
            shares: how many of each mode.
            max_cuts: how many times the clip of a continuation is cut off, at most.

        Returns:
            The examples, and the length of their captions in tokens, which is the same for all.
        """
        length = self._captions.any_length(draw)
        makers: dict[str, Callable[[random.Random, int, int], Example]] = {
            "text": self.text_example,
            "continuation": partial(self.continuation_example, max_cuts=max_cuts),
            "melody": self.melody_example,
        }
        weights = {"text": shares.text, "continuation": shares.continuation, "melody": shares.melody}
        found = []
        for mode in draw.choices(list(weights), list(weights.values()), k=size):
            example = makers[mode](draw, frames, length)
            dropped = draw.random()
            if dropped < shares.null:
                if draw.random() >= shares.null_songs:
                    example = self.melody_example(draw, frames, length)
                example = replace(example, caption=None, chroma=NULL_CHROMA, mode="null")
            elif dropped < shares.null + 0.08 and mode == "melody":
                example = replace(example, caption=None)
            found.append(example)
        return found, length

    def text_example(self, draw: random.Random, frames: int, length: int) -> Example:
        """Draws a song from its first note, which the caption names."""
        index, timbre = draw.choice(list(self._songs))
        caption = self._captions.of_length(
            draw, SONGS[index].name, timbre if draw.random() < 0.75 else None, length
        )
        return Example("text", caption, NULL_CHROMA, self._songs[index, timbre].tokens[:, :frames].long())

    def continuation_example(
        self, draw: random.Random, frames: int, length: int, max_cuts: int = 1
    ) -> Example:
        """Draws a clip of a song and its continuation; the caption may name the song.

        The codec cannot look ahead at the end of a clip, so its last tokens differ from those of the whole
        song. With several cuts, one example has several ends of clips, each followed by the continuation.
        Half of the cuts are at the end of a beat, where nothing but the song tells the next note.
        """
        index, timbre = draw.choice(list(self._songs))
        song = self._songs[index, timbre]
        starts = song.starts.tolist()
        room = min(LONG_FRAMES + SHORT_FRAMES - 2 * MIN_GIVEN_FRAMES, 2 * LONG_FRAMES - frames)
        first = draw.randrange(bisect(starts, room)) if draw.random() < 0.8 else 0
        start = starts[first]
        soonest, latest = start + MIN_GIVEN_FRAMES, start + frames - MIN_NEW_FRAMES
        ends = range(bisect_left(starts, soonest - SNIPPET_FRAMES), bisect(starts, latest - SNIPPET_FRAMES))
        tokens = song.tokens[:, start : start + frames].long()
        tokens[:, :EDGE_FRAMES] = song.first_tokens[first]
        found: list[int] = []
        beat_ends = [
            end for end in ends if -(starts[end] + SNIPPET_FRAMES) % BEAT_FRAMES <= BEFORE_BEAT_FRAMES
        ]
        for _ in range(max_cuts):
            end = draw.choice(beat_ends if beat_ends and draw.random() < 0.5 else ends)
            cut = starts[end] + SNIPPET_FRAMES - start
            if all(abs(cut - other) >= MIN_CUT_DISTANCE for other in found):
                tokens[:, cut - EDGE_FRAMES : cut] = song.last_tokens[end]
                found.append(cut)
        name = SONGS[index].name if draw.random() < 0.5 else None
        caption = self._captions.of_length(draw, name, timbre if draw.random() < 0.5 else None, length)
        mode = "continuation" if name else "unnamed"
        return Example(mode, caption, NULL_CHROMA, tokens, tuple(sorted(found)))

    def melody_example(self, draw: random.Random, frames: int, length: int) -> Example:
        """Draws a random tune with its chroma; the caption may name the timbre."""
        melody = draw.choice(self._short if frames <= SHORT_FRAMES else self._long)
        timbre = melody.timbre if draw.random() < 0.85 else None
        caption = self._captions.of_length(draw, None, timbre, length)
        chroma = melody.chroma
        if draw.random() < 0.5:  # the chroma of recordings is noisy
            chroma = chroma.clone()
            wrong = torch.rand(len(chroma)) < draw.uniform(0, 0.12)
            chroma[wrong] = torch.randint(12, (int(wrong.sum()),), dtype=chroma.dtype)
        return Example("melody", caption, chroma, melody.tokens[:, :frames].long())
