"""Captions of the renderings: varied ones for training, and others for the evaluation."""

import random
from collections.abc import Callable, Iterable

# Each of these words is a token of the tokenizer; all other words are tokenized letter by letter.
SONG_WORDS: dict[str, tuple[str, ...]] = {
    "ode to joy": ("ode to joy", "the ode to joy", "beethoven ode to joy", "joy"),
    "twinkle twinkle": ("twinkle twinkle", "twinkle twinkle little star", "little star", "twinkle"),
    "frere jacques": ("frere jacques", "brother john", "frere jacques brother john", "jacques"),
    "when the saints": ("when the saints", "when the saints go marching in", "the saints", "saints marching"),
    "jingle bells": ("jingle bells", "jingle bells jingle bells", "the jingle bells", "jingle"),
    "amazing grace": ("amazing grace", "amazing grace how sweet", "the amazing grace", "grace"),
    "greensleeves": ("greensleeves", "the greensleeves", "my greensleeves", "lady greensleeves"),
    "auld lang syne": ("auld lang syne", "for auld lang syne", "auld lang", "the auld lang syne"),
}
TIMBRE_WORDS: dict[str, tuple[str, ...]] = {
    "music box": ("music box", "a music box", "the music box", "toy music box"),
    "harp": ("harp", "a harp", "the harp", "soft harp"),
    "piano": ("piano", "a piano", "the piano", "upright piano"),
}
TRAINED = (
    "{song} on {timbre}",
    "{song} played on {timbre}",
    "{timbre} playing {song}",
    "{song} {timbre}",
    "{timbre} {song}",
    "{song} with {timbre}",
    "the song {song} on {timbre}",
    "a {filler} {song} on {timbre}",
    "{filler} {song} by {timbre}",
    "please play {song} on {timbre}",
    "{song}, {timbre}, {filler}",
    "{timbre}, {song}",
)
TRAINED_SONG_ONLY = (
    "{song}",
    "{filler} {song}",
    "play {song}",
    "the tune {song}",
    "{song} {filler} {filler}",
)
TRAINED_TIMBRE_ONLY = (
    "{timbre}",
    "{filler} {timbre}",
    "a melody on {timbre}",
    "a tune played by {timbre}",
    "{timbre}, {filler} {filler}",
    "music for {timbre}",
    "solo {timbre}",
)
TRAINED_UNNAMED = (
    "music",
    "{filler} music",
    "a tune",
    "some music please",
    "{filler} {filler} melody",
    "a melody",
)
FILLERS = (
    "slow", "fast", "calm", "happy", "sad", "gentle", "simple", "sweet", "old", "quiet", "warm", "bright",
    "clear", "nice", "classic", "famous", "little", "short", "children", "instrumental",
)  # fmt: skip

EVALUATED = (
    "i want to hear {song} performed with {timbre}",
    "{timbre} version of {song}",
    "a recording of {song} for {timbre} solo",
)
EVALUATED_SONG_ONLY = ("i want to hear {song}", "a version of {song}", "recording of {song} please")
EVALUATED_UNNAMED = "some nice music"
EVALUATED_TIMBRE_ONLY = ("i want to hear {timbre}", "a recording with {timbre}", "{timbre} version please")
"""None of the evaluation's captions occurs in training, but its words do, so that each of them is a token."""

_TEMPLATES = {
    (True, True): TRAINED,
    (True, False): TRAINED_SONG_ONLY,
    (False, True): TRAINED_TIMBRE_ONLY,
    (False, False): TRAINED_UNNAMED,
}


def caption(draw: random.Random, song: str | None, timbre: str | None) -> str:
    """Draws a caption for training that names a song and a timbre; None: it does not name one."""
    text = draw.choice(_TEMPLATES[song is not None, timbre is not None])
    while "{filler}" in text:
        text = text.replace("{filler}", draw.choice(FILLERS), 1)
    if draw.random() < 0.2:
        # A word of the evaluation's captions, or words that mean nothing to the model.
        extra = draw.choice(
            ("i", "want", "hear", "version", "recording", "performed", "with", _random_words(draw))
        )
        text = f"{text} {extra}" if draw.random() < 0.5 else f"{extra} {text}"
    return text.format(
        song=draw.choice(SONG_WORDS[song]) if song else "",
        timbre=draw.choice(TIMBRE_WORDS[timbre]) if timbre else "",
    )


class Captions:
    """Captions, sorted by what they name and by their length in tokens.

    A caption is between the chroma and the music in the model's input, so its length shifts every position
    after it. All captions of a batch must have the same length, because those of a request are not padded.
    """

    EACH = 500  # captions for each combination of song and timbre

    def __init__(self, length: Callable[[str], int], seed: int) -> None:
        """Draws the captions. `length` returns the number of a caption's tokens."""
        draw = random.Random(seed)
        self._lengths: list[int] = []
        self._by_length: dict[tuple[str | None, str | None], dict[int, list[str]]] = {}
        for song in (None, *SONG_WORDS):
            for timbre in (None, *TIMBRE_WORDS):
                known = self._by_length.setdefault((song, timbre), {})
                for _ in range(self.EACH):
                    text = caption(draw, song, timbre)
                    self._lengths.append(length(text))
                    known.setdefault(self._lengths[-1], []).append(text)

    def any_length(self, draw: random.Random) -> int:
        """Draws a length in tokens, each as often as it occurs."""
        return draw.choice(self._lengths)

    def of_length(self, draw: random.Random, song: str | None, timbre: str | None, length: int) -> str:
        """Draws a caption that names these and has `length` tokens, or else the next smaller number."""
        known = self._by_length[song, timbre]
        return draw.choice(known[max((n for n in known if n <= length), default=min(known))])


def words() -> list[str]:
    """Returns all words of the captions, each once, sorted. They are the tokenizer's tokens."""
    texts: Iterable[str] = [
        *TRAINED, *TRAINED_SONG_ONLY, *TRAINED_TIMBRE_ONLY, *TRAINED_UNNAMED, *FILLERS,
        *EVALUATED, *EVALUATED_SONG_ONLY, *EVALUATED_TIMBRE_ONLY,
        *(text for texts in SONG_WORDS.values() for text in texts),
        *(text for texts in TIMBRE_WORDS.values() for text in texts),
    ]  # fmt: skip
    found = {
        word
        for text in texts
        for word in text.replace(",", " ").split()
        if "{" not in word and word.isalpha()
    }
    return sorted(found)


def _random_words(draw: random.Random) -> str:
    """Draws one to three words of random letters and digits."""
    return " ".join(
        "".join(draw.choice("abcdefghijklmnopqrstuvwxyz0123456789") for _ in range(draw.randint(2, 7)))
        for _ in range(draw.randint(1, 3))
    )
