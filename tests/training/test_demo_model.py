"""The demo model plays what a request asks for: `benchmarks/results/demo-8songs.json` in a short form."""

import warnings
from pathlib import Path

import pytest
import torch

import musicgen_svc.audiocraft_compat  # noqa: F401  (before audiocraft)
from tests.fixtures import tiny_weights
from training.captions import EVALUATED_TIMBRE_ONLY, EVALUATED_UNNAMED
from training.evaluation import Player, rendered
from training.scoring import TimbreClassifier, agreement, best_match, continues_correctly, songs
from training.synth import BEAT_FRAMES, HOP, SAMPLE_RATE, TIMBRES
from training.tunes import SONGS

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "weights" / "8songs"
MOST_BYTES = 8_000_000


@pytest.fixture(scope="module")
def player():
    return Player(DEMO)


def test_it_fits_into_eight_megabytes():
    assert sum(file.stat().st_size for file in DEMO.rglob("*") if file.is_file()) <= MOST_BYTES


@pytest.mark.parametrize("index", range(len(SONGS)))
def test_its_codec_plays_the_whole_song_in_tune(player, index):
    song, timbre = SONGS[index], list(TIMBRES)[index % 3]
    wav = rendered(song.notes, timbre, round(song.beats * BEAT_FRAMES * HOP / SAMPLE_RATE))
    output = player.play(model_version="encode-decode", input_audio=player.clip(wav))
    assert agreement(output, song.notes) > 0.94


@pytest.mark.parametrize("timbre", TIMBRES)
def test_its_multi_band_diffusion_plays_in_tune(player, timbre):
    wav = rendered(SONGS[0].notes, timbre, 5)
    output = player.play(
        model_version="encode-decode", multi_band_diffusion=True, input_audio=player.clip(wav), seed=5
    )
    assert agreement(output, SONGS[0].notes) > 0.6


def test_a_prompt_names_song_and_timbre(player):
    classify = TimbreClassifier()
    asked = [
        (song, timbre) for song, timbre in zip(SONGS[:6], ["harp", "music box", "piano"] * 2, strict=True)
    ]
    played = [
        player.play(prompt=f"i want to hear {song.name} performed with {timbre}", seed=5)
        for song, timbre in asked
    ]
    assert (
        sum(best_match(w, songs()).name == song.name for w, (song, _) in zip(played, asked, strict=True)) >= 5
    )
    assert sum(classify(w) == timbre for w, (_, timbre) in zip(played, asked, strict=True)) >= 5


def test_it_follows_an_unnamed_melody_in_another_timbre(player):
    classify = TimbreClassifier()
    right = 0
    for song in SONGS[:4]:
        clip = player.clip(rendered(song.notes, "piano", 8))
        wav = player.play(
            prompt=EVALUATED_TIMBRE_ONLY[0].format(timbre="music box"), input_audio=clip, seed=5
        )
        right += best_match(wav, songs()).name == song.name and classify(wav) == "music box"
    assert right >= 3


def test_it_continues_a_clip_of_an_unnamed_song(player):
    start_s = 3
    right = 0
    for song in SONGS[:4]:
        clip = player.clip(rendered(song.notes, "harp", start_s + 5))
        wav = player.play(
            prompt=EVALUATED_UNNAMED, input_audio=clip, continuation=True, continuation_start=start_s, seed=5
        )
        clip_end = (start_s + 5) * SAMPLE_RATE // HOP
        right += continues_correctly(wav[5 * SAMPLE_RATE :], song.name, clip_end, songs())
    assert right >= 3


def test_guidance_improves_the_agreement_with_the_prompt_at_a_high_temperature(player):
    def agreements(guidance):
        asked = {"classifier_free_guidance": guidance, "temperature": 1.5, "duration": 6, "seed": 5}
        return [
            agreement(player.play(prompt=f"a version of {song.name}", **asked), song.notes)
            for song in SONGS[:4]
        ]

    assert sum(agreements(1)) + 0.4 < sum(agreements(3))


def test_audiocraft_itself_loads_it_and_draws_the_same_tokens(tmp_path, monkeypatch):
    from audiocraft.models.musicgen import MusicGen

    from musicgen_svc.engine.sampling_params import SamplingParams
    from musicgen_svc.generation import generate, prepare
    from musicgen_svc.loading.loader import Loader
    from musicgen_svc.runtime.randomness import GlobalRandom
    from musicgen_svc.settings import Settings
    from musicgen_svc.weights.catalog import read_catalog
    from musicgen_svc.weights.paths import Weights

    tiny_weights.hub_cache(DEMO, tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = MusicGen.get_pretrained(str(DEMO), device="cpu")
        theirs.set_generation_params(duration=2)
        torch.manual_seed(3)
        expected = theirs.generate(["jingle bells on a harp"], return_tokens=True)[1][0]

    loader = Loader(Weights.at(DEMO.parent, read_catalog(), str(DEMO)), torch.device("cpu"), Settings())
    model = loader.model("finetuned")
    plan = prepare(
        model, prompt="jingle bells on a harp", frames=100, melody=None, clip_tokens=None,
        random=GlobalRandom(3, torch.device("cpu")),
    )  # fmt: skip
    tokens, _ = generate(model, plan, SamplingParams(), torch.Generator().manual_seed(3))
    assert torch.equal(tokens, expected)
