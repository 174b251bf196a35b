"""The demo model's training data and scoring: tunes, renderings, captions, and the recognition of tunes."""

import itertools
import random

import numpy as np
import pytest
import torch

from training import captions
from training.scoring import (
    TimbreClassifier,
    agreement,
    best_match,
    continues_correctly,
    shuffled_p,
    similarity,
    songs,
)
from training.synth import BEAT_FRAMES, HOP, SAMPLE_RATE, TIMBRES, looped, pitches, render, strikes
from training.tunes import SONGS, UNSEEN, parse, random_tune


def rendered(notes, timbre, seconds, start_s=0):
    frames = (seconds + start_s) * SAMPLE_RATE // HOP
    wav = render(looped(notes, frames + BEAT_FRAMES), timbre)
    return wav[start_s * SAMPLE_RATE : (start_s + seconds) * SAMPLE_RATE].double().numpy()


def test_the_notation_is_parsed():
    assert parse("c d#:2 g,:.5 c'") == ((72, 1.0), (75, 2.0), (67, 0.5), (84, 1.0))


def test_there_are_eight_songs_in_whole_bars():
    assert len(SONGS) == len({song.notes for song in SONGS}) == 8
    assert all(song.beats % 4 == 0 or song.beats % 3 == 0 for song in SONGS)


def test_random_tunes_are_repeatable_and_differ():
    tunes = {random_tune(f"seed {n}", 16).notes for n in range(100)}
    assert len(tunes) == 100
    assert random_tune("seed 1", 16) == random_tune("seed 1", 16)
    assert all(72 <= pitch < 84 for notes in tunes for pitch, _ in notes)


def test_a_rendering_is_as_long_as_its_notes():
    for tune in SONGS:
        wav = render(tune.notes, "harp")
        assert len(wav) == tune.beats * BEAT_FRAMES * HOP
        assert len(pitches(tune.notes)) * HOP == len(wav)


def test_a_held_note_is_struck_again_softer_on_each_beat():
    levels = [level for _, _, level in strikes(((72, 3.5),))]
    assert [round(b / a, 3) for a, b in itertools.pairwise(levels)] == [0.65] * 3
    wav = render(((72, 3.0),), "piano")
    beats = wav.view(3, -1).abs().amax(1)
    assert beats[0] > beats[1] > beats[2]


def test_the_timbres_are_about_as_loud_as_the_service_makes_its_output():
    import pyloudnorm

    for timbre in TIMBRES:
        loudness = pyloudnorm.Meter(SAMPLE_RATE).integrated_loudness(rendered(SONGS[0].notes, timbre, 15))
        assert -16.5 < loudness < -12.5


def test_no_caption_of_the_evaluation_is_in_the_training_data():
    draw = random.Random(0)
    timbres = (None, *TIMBRES)
    trained = {
        captions.caption(draw, song, timbre)
        for song in (None, *captions.SONG_WORDS)
        for timbre in timbres
        for _ in range(2000)
    }
    templates = (*captions.EVALUATED, *captions.EVALUATED_SONG_ONLY, *captions.EVALUATED_TIMBRE_ONLY)
    asked = {t.format(song=s, timbre=i) for t in templates for s in captions.SONG_WORDS for i in TIMBRES}
    assert not (asked | {captions.EVALUATED_UNNAMED}) & trained


def test_the_unseen_tunes_are_not_among_the_eight_songs():
    assert not {tune.notes for tune in UNSEEN} & {song.notes for song in SONGS}


def test_captions_have_the_requested_length():
    made = captions.Captions(lambda text: len(text.split()), seed=0)
    draw = random.Random(1)
    length = made.any_length(draw)
    for _ in range(50):
        text = made.of_length(draw, "greensleeves", "harp", 6)
        assert len(text.split()) == 6
        assert any(word in text for word in captions.SONG_WORDS["greensleeves"])
    assert length > 0


class TestScorer:
    """The scoring is right on true renderings, and rejects others."""

    @pytest.mark.parametrize("timbre", TIMBRES)
    @pytest.mark.parametrize("start_s", [0, 5])
    def test_recognizes_every_song_and_timbre(self, timbre, start_s):
        classify = TimbreClassifier()
        for song in SONGS:
            wav = rendered(song.notes, timbre, 8, start_s)
            match = best_match(wav, songs())
            assert match.name == song.name
            assert match.score > 0.75
            assert classify(wav) == timbre

    def test_recognizes_the_position_in_a_song(self):
        for song in SONGS:
            wav = rendered(song.notes, "piano", 8, 5)
            there = 5 * SAMPLE_RATE // HOP
            assert continues_correctly(wav, song.name, there, songs())
            assert not continues_correctly(wav, song.name, there + 36, songs())

    @pytest.mark.parametrize(("seconds", "then"), [(3, None), (5, None), (5, SONGS[6]), (2, SONGS[1])])
    def test_a_song_that_does_not_continue_to_the_end_is_rejected(self, seconds, then):
        """It is followed by silence or by another song."""
        for song in SONGS[2:6]:
            wav, cut = rendered(song.notes, "piano", 8, 5).copy(), seconds * SAMPLE_RATE
            wav[cut:] = 0 if then is None else rendered(then.notes, "piano", 8)[cut:]
            assert not continues_correctly(wav, song.name, 5 * SAMPLE_RATE // HOP, songs())

    def test_distinguishes_noise_silence_and_other_tunes_from_a_song(self):
        noise = np.random.default_rng(0).standard_normal(8 * SAMPLE_RATE) * 0.1
        ode = SONGS[0].notes
        right = agreement(rendered(ode, "harp", 8), ode)
        assert agreement(noise, ode) < 0.5 < 0.75 < right
        assert agreement(np.zeros(8 * SAMPLE_RATE), ode) == 0
        assert agreement(rendered(SONGS[6].notes, "harp", 8), ode) < right - 0.2

    def test_the_permutation_test_is_significant_only_if_outputs_follow_their_clips(self):
        clips = [rendered(random_tune(f"p {n}", 20).notes, "harp", 8) for n in range(8)]
        others = [rendered(random_tune(f"q {n}", 20).notes, "harp", 8) for n in range(8)]
        played = [rendered(random_tune(f"p {n}", 20).notes, "piano", 8) for n in range(8)]
        assert shuffled_p(played, clips, rounds=2000)[2] < 0.01
        assert shuffled_p(others, clips, rounds=2000)[2] > 0.05
        assert similarity(played[0], clips[0]) > similarity(played[0], clips[1])


def test_a_looped_tune_is_repeated():
    notes = ((72, 1.0), (74, 2.0))
    found = looped(notes, 100)
    assert sum(beats for _, beats in found) * BEAT_FRAMES >= 100
    assert found[: len(notes) * 2] == notes * 2
    assert torch.equal(pitches(found)[:72], pitches(found)[72:144])
