"""The training code: a step teaches, a stopped run goes on, and what is written loads."""

import itertools
import random
from dataclasses import replace

import pytest
import torch

from musicgen_svc.audiocraft_compat import ChromaExtractor
from training import codec as encodec
from training import lm as language
from training.captions import Captions
from training.data import (
    APART,
    BEFORE_BEAT,
    CHROMA_FRAMES,
    EDGE,
    LONG,
    SHORT,
    SILENT,
    SNIPPET,
    Lessons,
    Melody,
    Shares,
    Song,
    chroma_extractor,
    encoded_melody,
    encoded_song,
    pitch_classes,
)
from training.resuming import Resumable, step_seed
from training.stages import Stages
from training.synth import BEAT_FRAMES, render
from training.text import TextEncoder, save_text_encoder

# audiocraft builds its convolutions with the older of torch's two weight norms.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5") / "t5-small"
    save_text_encoder(folder)
    return TextEncoder(folder)


@pytest.fixture(scope="module")
def lessons(text):
    """Random tokens in the right shapes: what is learned from them is that they repeat."""
    torch.manual_seed(0)

    def tokens(*shape):
        return torch.randint(256, shape).short()

    songs = {
        (0, "harp"): Song(
            tokens(4, 2 * LONG), torch.arange(0, 1900, 5), tokens(380, 4, 10), tokens(380, 4, 10)
        )
    }
    chroma = torch.randint(12, (CHROMA_FRAMES,)).to(torch.int8)
    melodies = [Melody("piano", chroma, tokens(4, SHORT)), Melody("piano", chroma, tokens(4, LONG))]
    return Lessons(songs, melodies, Captions(text.length, 0))


class TestText:
    def test_words_mean_the_same_in_any_case(self, text):
        assert torch.equal(text("ode to joy on a harp"), text("Ode to JOY on a Harp"))
        assert not torch.equal(text("ode to joy on a harp"), text("ode to joy on a star"))

    def test_length_counts_what_stands_before_the_music(self, text):
        assert text.length("ode to joy") == len(text("ode to joy")) == 4

    def test_unknown_words_are_spelled_and_told_apart(self, text):
        assert text.length("zebra") > 4
        assert not torch.equal(text("zebra"), text("zebru"))


class TestData:
    def test_a_melodys_chroma_is_its_notes(self):
        notes = ((72, 2.0), (76, 2.0), (79, 4.0))
        found = pitch_classes(chroma_extractor(), render(notes, "piano"))
        beat = BEAT_FRAMES // 4
        assert len(found) == CHROMA_FRAMES
        assert found[1 : 2 * beat - 1].unique().tolist() == [0]
        assert found[2 * beat + 1 : 4 * beat - 1].unique().tolist() == [4]
        assert found[4 * beat + 1 : 8 * beat - 1].unique().tolist() == [7]

    def test_encoded_examples_have_the_length_of_what_they_encode(self):
        codec = encodec.build().eval()
        with torch.no_grad():
            codec(torch.randn(2, 1, 32_000))
        melody = encoded_melody(codec, chroma_extractor(), "test", SHORT)
        assert melody.tokens.shape == (4, SHORT)
        song = encoded_song(codec, 0, "harp")
        assert song.tokens.shape == (4, 2 * LONG)
        assert song.starts[0] == 0 and (song.starts.diff() > 0).all()
        assert len(song.starts) == len(song.begins) == len(song.ends)

    def test_every_batch_is_as_long_as_it_says(self, lessons, text):
        shares = Shares(1.0, 1.0, 1.0)
        for seed, frames in ((1, SHORT), (2, LONG), (3, SHORT)):
            examples, length = lessons.batch(random.Random(seed), 12, frames, shares)
            assert all(example.tokens.shape == (4, frames) for example in examples)
            assert all(cut < frames for example in examples for cut in example.cuts)
            assert any(example.cuts for example in examples)
            lengths = [text.length(example.caption) for example in examples if example.caption]
            assert max(lengths) <= max(length, 2)

    def test_before_each_cut_a_clip_sounds_as_if_it_ended(self, lessons):
        one, several = (lessons.continued(random.Random(5), LONG, 6, cuts=n) for n in (1, 8))
        assert len(one.cuts) == 1 and len(several.cuts) > 2
        assert min(b - a for a, b in itertools.pairwise(several.cuts)) >= APART
        assert all(_end_before(cut, example, lessons) for example in (one, several) for cut in example.cuts)

    def test_half_of_the_cuts_are_where_the_next_note_cannot_be_told_from_the_last(self, lessons):
        examples = [lessons.continued(random.Random(seed), SHORT, 6) for seed in range(200)]
        ends = [_end_before(example.cuts[0], example, lessons) for example in examples]
        assert 0.4 < sum(-end % BEAT_FRAMES <= BEFORE_BEAT for end in ends) / len(ends) < 0.8

    def test_chroma_frames_match_the_configuration_that_is_exported(self):
        wanted = language.CONFIG["conditioners"]["self_wav"]["chroma_stem"]
        chroma = ChromaExtractor(
            sample_rate=32_000, n_chroma=12, radix2_exp=wanted["radix2_exp"], winhop=wanted["winhop"]
        )
        seconds = language.CONFIG["dataset"]["segment_duration"]
        assert 1 + int(32_000 * seconds) // chroma.winhop == CHROMA_FRAMES


def _end_before(cut, example, lessons):
    """The frame of the song at which the clip ends whose last frames stand there."""
    song = lessons._songs[0, "harp"]
    (found,) = (song.ends == example.tokens[:, cut - EDGE : cut]).all((1, 2)).nonzero()[:, 0].tolist()
    return int(song.starts[found]) + SNIPPET


class TestLanguageModel:
    def test_a_few_steps_lower_the_loss(self, lessons, text, tmp_path, monkeypatch):
        monkeypatch.setattr(language, "SHORT_BATCH", 2)
        monkeypatch.setattr(language, "WARM_UP_STEPS", 1)
        torch.manual_seed(0)
        model = language.DemoModel()
        losses = []
        language.train(
            model,
            text,
            lessons,
            replace(language.LEARNING, steps=8, long=0.0),
            1,
            tmp_path / "run.pt",
            lambda _, found: losses.append(min(found.values())),
        )
        assert losses[-1] < losses[0] - 0.1

    def test_of_a_clip_is_learned_what_its_place_tells_but_not_how_it_is_cut(self, lessons, text):
        torch.manual_seed(0)
        model = language.DemoModel().eval()
        example = lessons.continued(random.Random(0), SHORT, 6, cuts=4)
        course = replace(language.LEARNING, resumed=3.0)
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(language, "NOISY", 0.0)
            whole = language.loss(model, text, [example], 6, course)
            logits, there = model(example.tokens[None], text(example.caption)[None], example.chroma[None])
        assert torch.isfinite(whole).all()
        assert not there[0, 3, -3:].any()
        surprise = torch.nn.functional.cross_entropy(
            logits.permute(0, 3, 1, 2).nan_to_num(), example.tokens[None], reduction="none"
        )[0]
        weights = torch.tensor(language.CODEBOOK_WEIGHTS)[:, None] * there[0]
        for cut in example.cuts:
            weights[:, cut : cut + language.RESUMED] *= 3
            weights[:, cut - EDGE : cut] = 0
        weights[:, : min(language.PLACED, example.cuts[0])] = 0
        assert torch.allclose(whole[0], (surprise * weights).sum() / weights.sum(), atol=1e-3)

    def test_the_null_row_knows_no_song_by_its_name_or_its_chroma(self, lessons):
        shares = Shares(1.0, 1.0, 1.0)
        examples = [e for seed in range(40) for e in lessons.batch(random.Random(seed), 8, SHORT, shares)[0]]
        nothing = [example for example in examples if example.kind == "nothing"]
        assert nothing and all(e.caption is None and torch.equal(e.chroma, SILENT) for e in nothing)
        # Whoever asks for nothing and is told nothing is in it, and nobody else.
        asked = [example for example in examples if example.kind != "nothing"]
        assert all(e.caption or not torch.equal(e.chroma, SILENT) for e in asked)

    def test_disturbed_tokens_are_as_many_as_asked_for_and_half_of_them_come_from_nearby(self):
        torch.manual_seed(0)
        row = torch.arange(4000).repeat(4, 1)  # told apart from any token by its size
        disturbed = row.clone()
        language._disturb(disturbed, torch.tensor(0.1))
        wrong = disturbed != row
        assert 0.08 < wrong.float().mean() < 0.12
        moved = (disturbed - row)[wrong].abs() <= language.NEIGHBOUR
        assert 0.35 < moved.float().mean() < 0.6

    def test_stretches_that_slip_are_the_tokens_of_a_little_earlier_or_later(self):
        torch.manual_seed(0)
        row = torch.arange(4000).repeat(4, 1)
        slipped = row.clone()
        language._slip(slipped, 4)
        moved = slipped - row
        assert (moved == moved[:1]).all(), "all codebooks go together"
        assert moved.any() and moved.abs().max() <= 3 and (moved[0] != 0).sum() <= 4 * 40

    @pytest.mark.parametrize("course", [language.LEARNING, language.PRACTICE])
    def test_a_courses_rate_rises_to_its_peak_and_falls_to_its_end(self, course):
        rates = [course.rate(step) for step in range(course.steps)]
        assert rates[0] < 0.05 * course.peak and max(rates) <= course.peak
        assert max(rates) > 0.8 * course.peak and rates[-1] < 0.03 * course.peak
        top = rates.index(max(rates))
        assert rates[: top + 1] == sorted(rates[: top + 1])
        assert rates[top:] == sorted(rates[top:], reverse=True)

    def test_it_starts_out_listening_to_the_chroma_of_the_moment(self):
        """Position t behind the prefix attends to chroma frame t / 4 more than to any other."""
        prefix = CHROMA_FRAMES + 7
        frames = torch.arange(0, 1400, 100)
        seen = looked_at(0, 0, prefix + frames, torch.arange(CHROMA_FRAMES))
        assert torch.equal(seen, frames // 4)

    @pytest.mark.parametrize(
        ("layer", "head", "beats"), [(0, 1, 0.5), (0, 2, 1), (0, 3, 2), (1, 1, 1.5), (1, 2, 3), (1, 3, 4)]
    )
    def test_it_starts_out_comparing_with_what_came_next_some_beats_ago(self, layer, head, beats):
        places = torch.arange(500, 1900, 100)
        assert torch.equal(
            looked_at(layer, head, places, torch.arange(1900)), places + 1 - round(beats * BEAT_FRAMES)
        )


def looked_at(layer, head, at, among):
    """Which of the positions a head of a fresh model attends to most, from each of `at`."""
    torch.manual_seed(0)
    model = language.DemoModel()
    half, width = language.DIM // 2, language.DIM // 4
    periods = language.MAX_PERIOD ** (torch.arange(half) / (half - 1))

    def positions(at):
        angles = at.float()[:, None] / periods
        return torch.cat([angles.cos(), angles.sin()], dim=1)

    weight = model.lm.transformer.layers[layer].self_attn.in_proj_weight.detach()
    queries, keys = (weight[start + head * width :][:width] for start in (0, language.DIM))
    return among[((positions(at) @ queries.T) @ (positions(among) @ keys.T).T).argmax(1)]


class TestResuming:
    def test_a_stopped_run_ends_as_one_that_was_not(self, tmp_path, monkeypatch):
        monkeypatch.setattr(Resumable, "EVERY", 1)
        small = encodec.CONFIG | {"seanet": encodec.CONFIG["seanet"] | {"n_filters": 2, "dimension": 8}}
        monkeypatch.setattr(encodec, "CONFIG", small)
        monkeypatch.setattr(encodec, "TUNES", 3)
        monkeypatch.setattr(encodec, "CROP", 6_400)

        class StoppedError(Exception):
            pass

        def train(file, stop_after=None):
            def report(step, _):
                if step == stop_after:
                    raise StoppedError

            torch.manual_seed(0)
            codec = encodec.build()
            encodec.train(codec, 4, 1, file, report)
            return codec.state_dict()

        whole = train(tmp_path / "whole.pt")
        with pytest.raises(StoppedError):
            train(tmp_path / "stopped.pt", stop_after=1)
        resumed = train(tmp_path / "stopped.pt")
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    def test_steps_have_seeds_of_their_own(self):
        assert len({step_seed(seed, step) for seed in (1, 2) for step in range(100)}) == 200


def test_a_finished_stage_is_not_repeated(tmp_path):
    stages = Stages(tmp_path, effort=0)
    first = stages.codec().state_dict()
    torch.save({name: torch.zeros_like(tensor) for name, tensor in first.items()}, tmp_path / "codec.pt")
    assert not any(tensor.any() for tensor in stages.codec().state_dict().values())


def test_the_language_model_is_the_mean_of_what_its_last_courses_end_with(tmp_path, text):
    courses = list(language.COURSES)
    for number, name in enumerate(courses):
        state = language.DemoModel().state_dict()
        torch.save({key: torch.full_like(x, number) for key, x in state.items()}, tmp_path / f"{name}.pt")
    model = Stages(tmp_path).language_model(encodec.build(), text)
    wanted = sum(courses.index(name) for name in language.AVERAGED) / len(language.AVERAGED)
    assert len(language.AVERAGED) > 1
    assert all((parameter == wanted).all() for parameter in model.parameters())
