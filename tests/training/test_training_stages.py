"""The training code: a step teaches, a stopped run goes on, and what is written loads."""

import random

import pytest
import torch

from musicgen_svc.compat import ChromaExtractor
from training import codec as encodec
from training import lm as language
from training.captions import Captions
from training.data import (
    CHROMA_FRAMES,
    LONG,
    SHORT,
    Lessons,
    Melody,
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
        shares = {"text": 1.0, "continuation": 1.0, "melody": 1.0}
        for seed, frames in ((1, SHORT), (2, LONG), (3, SHORT)):
            examples, length = lessons.batch(random.Random(seed), 12, frames, shares)
            assert all(example.tokens.shape == (4, frames) for example in examples)
            assert all(example.given < frames for example in examples)
            assert any(example.given for example in examples)
            lengths = [text.length(example.caption) for example in examples if example.caption]
            assert max(lengths) <= max(length, 2)

    def test_chroma_frames_match_the_configuration_that_is_exported(self):
        wanted = language.CONFIG["conditioners"]["self_wav"]["chroma_stem"]
        chroma = ChromaExtractor(
            sample_rate=32_000, n_chroma=12, radix2_exp=wanted["radix2_exp"], winhop=wanted["winhop"]
        )
        seconds = language.CONFIG["dataset"]["segment_duration"]
        assert 1 + int(32_000 * seconds) // chroma.winhop == CHROMA_FRAMES


class TestLanguageModel:
    def test_a_few_steps_lower_the_loss(self, lessons, text, tmp_path, monkeypatch):
        monkeypatch.setattr(language, "LONG_SHARE", 0.0)
        monkeypatch.setattr(language, "SHORT_BATCH", 2)
        monkeypatch.setattr(language, "WARM_UP_STEPS", 1)
        torch.manual_seed(0)
        model = language.DemoModel()
        losses = []
        language.train(
            model,
            text,
            lessons,
            8,
            1,
            tmp_path / "run.pt",
            lambda _, found: losses.append(min(found.values())),
        )
        assert losses[-1] < losses[0] - 0.1

    def test_nothing_is_learned_from_the_prompt_or_from_what_the_delays_leave_out(self, lessons, text):
        torch.manual_seed(0)
        model = language.DemoModel().eval()
        example = lessons.continued(random.Random(0), SHORT, 6)
        given = example.given
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(language, "NOISY", 0.0)
            whole = language.loss(model, text, [example], 6)
            logits, there = model(example.tokens[None], text(example.caption)[None], example.chroma[None])
        assert torch.isfinite(whole).all()
        assert not there[0, 3, -3:].any()
        surprise = torch.nn.functional.cross_entropy(
            logits.permute(0, 3, 1, 2).nan_to_num(), example.tokens[None], reduction="none"
        )[0]
        weights = torch.tensor(language.CODEBOOK_WEIGHTS)[:, None] * there[0]
        weights[:, :given] = 0
        assert torch.allclose(whole[0], (surprise * weights).sum() / weights.sum(), atol=1e-4)

    def test_it_starts_out_listening_to_the_chroma_of_the_moment(self):
        """Position t behind the prefix attends to chroma frame t / 4 more than to any other."""
        torch.manual_seed(0)
        model = language.DemoModel()
        prefix = CHROMA_FRAMES + 7
        frames = torch.arange(0, 1400, 100)
        half = language.DIM // 2
        periods = language.MAX_PERIOD ** (torch.arange(half) / (half - 1))

        def positions(at):
            angles = at[:, None] / periods
            return torch.cat([angles.cos(), angles.sin()], dim=1)

        weight = model.lm.transformer.layers[0].self_attn.in_proj_weight.detach()
        head = language.DIM // 4
        queries = positions(prefix + frames.float()) @ weight[:head].T
        keys = positions(torch.arange(CHROMA_FRAMES).float()) @ weight[language.DIM : language.DIM + head].T
        assert torch.equal((queries @ keys.T).argmax(1), frames // 4)


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
