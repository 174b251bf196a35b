"""The training code: a few steps lower the loss, a stopped run can be resumed, and stages are kept."""

import itertools
import random
from dataclasses import replace

import pytest
import torch

from musicgen_svc.audiocraft_compat import ChromaExtractor
from training import codec as encodec
from training import lm as language
from training import lm_phases, lm_training
from training.captions import Captions
from training.data import (
    BEFORE_BEAT_FRAMES,
    CHROMA_FRAMES,
    EDGE_FRAMES,
    LONG_FRAMES,
    MIN_CUT_DISTANCE,
    NULL_CHROMA,
    SHORT_FRAMES,
    SNIPPET_FRAMES,
    ExampleSampler,
    MelodyTokens,
    Shares,
    SongTokens,
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
def sampler(text):
    """A sampler of random tokens with the right shapes. A model can learn that they repeat."""
    torch.manual_seed(0)

    def tokens(*shape):
        return torch.randint(256, shape).short()

    songs = {
        (0, "harp"): SongTokens(
            tokens(4, 2 * LONG_FRAMES), torch.arange(0, 1900, 5), tokens(380, 4, 10), tokens(380, 4, 10)
        )
    }
    chroma = torch.randint(12, (CHROMA_FRAMES,)).to(torch.int8)
    melodies = [
        MelodyTokens("piano", chroma, tokens(4, SHORT_FRAMES)),
        MelodyTokens("piano", chroma, tokens(4, LONG_FRAMES)),
    ]
    return ExampleSampler(songs, melodies, Captions(text.length, 0))


class TestText:
    def test_words_have_the_same_embedding_in_any_case(self, text):
        assert torch.equal(text("ode to joy on a harp"), text("Ode to JOY on a Harp"))
        assert not torch.equal(text("ode to joy on a harp"), text("ode to joy on a star"))

    def test_length_is_the_number_of_states(self, text):
        assert text.length("ode to joy") == len(text("ode to joy")) == 4

    def test_unknown_words_are_tokenized_by_letters_and_differ(self, text):
        assert text.length("zebra") > 4
        assert not torch.equal(text("zebra"), text("zebru"))


class TestData:
    def test_the_chroma_of_a_melody_is_its_notes(self):
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
        melody = encoded_melody(codec, chroma_extractor(), "test", SHORT_FRAMES)
        assert melody.tokens.shape == (4, SHORT_FRAMES)
        song = encoded_song(codec, 0, "harp")
        assert song.tokens.shape == (4, 2 * LONG_FRAMES)
        assert song.starts[0] == 0 and (song.starts.diff() > 0).all()
        assert len(song.starts) == len(song.first_tokens) == len(song.last_tokens)

    def test_every_batch_has_the_lengths_that_it_states(self, sampler, text):
        shares = Shares(1.0, 1.0, 1.0)
        for seed, frames in ((1, SHORT_FRAMES), (2, LONG_FRAMES), (3, SHORT_FRAMES)):
            examples, length = sampler.batch(random.Random(seed), 12, frames, shares)
            assert all(example.tokens.shape == (4, frames) for example in examples)
            assert all(cut < frames for example in examples for cut in example.cuts)
            assert any(example.cuts for example in examples)
            lengths = [text.length(example.caption) for example in examples if example.caption]
            assert max(lengths) <= max(length, 2)

    def test_the_tokens_before_each_cut_are_those_of_the_end_of_a_clip(self, sampler):
        one, several = (
            sampler.continuation_example(random.Random(5), LONG_FRAMES, 6, max_cuts=n) for n in (1, 8)
        )
        assert len(one.cuts) == 1 and len(several.cuts) > 2
        assert min(b - a for a, b in itertools.pairwise(several.cuts)) >= MIN_CUT_DISTANCE
        assert all(_end_before(cut, example, sampler) for example in (one, several) for cut in example.cuts)

    def test_about_half_of_the_cuts_are_at_the_end_of_a_beat(self, sampler):
        examples = [sampler.continuation_example(random.Random(seed), SHORT_FRAMES, 6) for seed in range(200)]
        ends = [_end_before(example.cuts[0], example, sampler) for example in examples]
        assert 0.4 < sum(-end % BEAT_FRAMES <= BEFORE_BEAT_FRAMES for end in ends) / len(ends) < 0.8

    def test_chroma_frames_match_the_configuration_that_is_exported(self):
        wanted = language.CONFIG["conditioners"]["self_wav"]["chroma_stem"]
        chroma = ChromaExtractor(
            sample_rate=32_000, n_chroma=12, radix2_exp=wanted["radix2_exp"], winhop=wanted["winhop"]
        )
        seconds = language.CONFIG["dataset"]["segment_duration"]
        assert 1 + int(32_000 * seconds) // chroma.winhop == CHROMA_FRAMES


def _end_before(cut, example, sampler):
    """Returns the frame of the song at which the clip ends whose last tokens are before the cut."""
    song = sampler._songs[0, "harp"]
    edge = example.tokens[:, cut - EDGE_FRAMES : cut]
    (found,) = (song.last_tokens == edge).all((1, 2)).nonzero()[:, 0].tolist()
    return int(song.starts[found]) + SNIPPET_FRAMES


class TestLanguageModel:
    def test_a_few_steps_lower_the_loss(self, sampler, text, tmp_path, monkeypatch):
        monkeypatch.setattr(lm_training, "SHORT_BATCH", 2)
        monkeypatch.setattr(lm_phases, "WARM_UP_STEPS", 1)
        torch.manual_seed(0)
        model = language.DemoModel()
        losses = []
        lm_training.train(
            model,
            text,
            sampler,
            replace(lm_phases.BASE, steps=8, long_share=0.0),
            1,
            tmp_path / "run.pt",
            lambda _, found: losses.append(min(found.values())),
        )
        assert losses[-1] < losses[0] - 0.1

    def test_the_loss_ignores_a_clip_before_its_position_is_known_and_the_edge_of_a_cut(self, sampler, text):
        torch.manual_seed(0)
        model = language.DemoModel().eval()
        example = sampler.continuation_example(random.Random(0), SHORT_FRAMES, 6, max_cuts=4)
        phase = replace(lm_phases.BASE, after_cut_weight=3.0)
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(lm_training, "NOISY_SHARE", 0.0)
            whole = lm_training.loss(model, text, [example], 6, phase)
            logits, there = model(example.tokens[None], text(example.caption)[None], example.chroma[None])
        assert torch.isfinite(whole).all()
        assert not there[0, 3, -3:].any()
        surprise = torch.nn.functional.cross_entropy(
            logits.permute(0, 3, 1, 2).nan_to_num(), example.tokens[None], reduction="none"
        )[0]
        weights = torch.tensor(lm_training.CODEBOOK_WEIGHTS)[:, None] * there[0]
        for cut in example.cuts:
            weights[:, cut : cut + lm_training.AFTER_CUT_FRAMES] *= 3
            weights[:, cut - EDGE_FRAMES : cut] = 0
        weights[:, : min(lm_training.UNLOCATED_FRAMES, example.cuts[0])] = 0
        assert torch.allclose(whole[0], (surprise * weights).sum() / weights.sum(), atol=1e-3)

    def test_null_examples_and_only_those_have_neither_caption_nor_chroma(self, sampler):
        shares = Shares(1.0, 1.0, 1.0)
        examples = [
            e for seed in range(40) for e in sampler.batch(random.Random(seed), 8, SHORT_FRAMES, shares)[0]
        ]
        null = [example for example in examples if example.mode == "null"]
        assert null and all(e.caption is None and torch.equal(e.chroma, NULL_CHROMA) for e in null)
        asked = [example for example in examples if example.mode != "null"]
        assert all(e.caption or not torch.equal(e.chroma, NULL_CHROMA) for e in asked)

    def test_the_given_part_of_the_tokens_is_replaced_and_half_of_them_by_neighbours(self):
        torch.manual_seed(0)
        row = torch.arange(4000).repeat(4, 1)  # numbers that identify their frames
        replaced = row.clone()
        lm_training._replace_tokens(replaced, torch.tensor(0.1))
        wrong = replaced != row
        assert 0.08 < wrong.float().mean() < 0.12
        moved = (replaced - row)[wrong].abs() <= lm_training.NEIGHBOUR_FRAMES
        assert 0.35 < moved.float().mean() < 0.6

    def test_shifted_stretches_are_tokens_of_up_to_three_frames_earlier_or_later(self):
        torch.manual_seed(0)
        row = torch.arange(4000).repeat(4, 1)
        shifted = row.clone()
        lm_training._shift_stretches(shifted, 4)
        moved = shifted - row
        assert (moved == moved[:1]).all(), "all codebooks must be shifted together"
        assert moved.any() and moved.abs().max() <= 3 and (moved[0] != 0).sum() <= 4 * 40

    @pytest.mark.parametrize("phase", [lm_phases.BASE, lm_phases.ROBUSTNESS])
    def test_a_phases_rate_rises_to_its_peak_and_falls_to_its_end(self, phase):
        rates = [phase.rate(step) for step in range(phase.steps)]
        assert rates[0] < 0.05 * phase.peak and max(rates) <= phase.peak
        assert max(rates) > 0.8 * phase.peak and rates[-1] < 0.03 * phase.peak
        top = rates.index(max(rates))
        assert rates[: top + 1] == sorted(rates[: top + 1])
        assert rates[top:] == sorted(rates[top:], reverse=True)

    def test_a_head_is_initialized_to_attend_to_the_chroma_of_the_same_moment(self):
        """Frame t attends to chroma frame t / 4 more than to any other."""
        prefix = CHROMA_FRAMES + 7
        frames = torch.arange(0, 1400, 100)
        seen = most_attended(0, 0, prefix + frames, torch.arange(CHROMA_FRAMES))
        assert torch.equal(seen, frames // 4)

    @pytest.mark.parametrize(
        ("layer", "head", "beats"), [(0, 1, 0.5), (0, 2, 1), (0, 3, 2), (1, 1, 1.5), (1, 2, 3), (1, 3, 4)]
    )
    def test_heads_are_initialized_to_attend_to_the_next_frame_of_earlier_beats(self, layer, head, beats):
        frames = torch.arange(500, 1900, 100)
        assert torch.equal(
            most_attended(layer, head, frames, torch.arange(1900)), frames + 1 - round(beats * BEAT_FRAMES)
        )


def most_attended(layer, head, at, among):
    """Returns the position in `among` to which a head of a new model attends most, from each of `at`."""
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
    def test_a_resumed_run_gives_the_same_weights_as_one_that_was_not_stopped(self, tmp_path, monkeypatch):
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

    def test_every_step_has_its_own_seed(self):
        assert len({step_seed(seed, step) for seed in (1, 2) for step in range(100)}) == 200


def test_a_finished_stage_is_not_repeated(tmp_path):
    stages = Stages(tmp_path, effort=0)
    first = stages.codec().state_dict()
    torch.save({name: torch.zeros_like(tensor) for name, tensor in first.items()}, tmp_path / "codec.pt")
    assert not any(tensor.any() for tensor in stages.codec().state_dict().values())


def test_the_language_model_is_the_mean_of_the_averaged_phases(tmp_path, text):
    phases = list(lm_phases.PHASES)
    for number, name in enumerate(phases):
        state = language.DemoModel().state_dict()
        torch.save({key: torch.full_like(x, number) for key, x in state.items()}, tmp_path / f"{name}.pt")
    model = Stages(tmp_path).language_model(encodec.build(), text)
    wanted = sum(phases.index(name) for name in lm_phases.AVERAGED) / len(lm_phases.AVERAGED)
    assert len(lm_phases.AVERAGED) > 1
    assert all((parameter == wanted).all() for parameter in model.parameters())
