"""What the demo model can do, through the service itself: each row of the benchmark as one function."""

import asyncio
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyloudnorm
import soundfile
import torch

from musicgen_svc.service import Service
from musicgen_svc.settings import Settings
from training.captions import EVALUATED, EVALUATED_SONG_ONLY, EVALUATED_TIMBRE_ONLY, EVALUATED_UNNAMED
from training.codec import si_snr_db, spectral_distance
from training.scoring import (
    Array,
    TimbreClassifier,
    agreement,
    best_match,
    chroma,
    goes_on_right,
    shuffled_p,
    similarity,
    songs,
)
from training.synth import BEAT_FRAMES, HOP, SAMPLE_RATE, TIMBRES, looped, render
from training.tunes import SONGS, UNSEEN, Notes, Tune, random_tune

SECONDS = 8
SEEDS = (1, 2, 3)
CLIP_STARTS_S = (0, 3, 7)
Figures = dict[str, Any]


class Player:
    """Requests to a service in this process; samples back."""

    def __init__(self, weights: Path | None = None) -> None:
        self._folder = Path(tempfile.mkdtemp())
        self._service = Service(Settings(output_grace_s=600.0))
        self._service.start(str(weights) if weights else None)

    def play(self, **fields: object) -> Array:
        """Samples [T] at 32 kHz of one prediction."""
        path = asyncio.run(self._service.predict(DEFAULTS | fields, lambda name, value: None))
        wav, rate = soundfile.read(path)
        assert rate == SAMPLE_RATE
        path.unlink()
        return np.asarray(wav, dtype=np.float64)

    def clip(self, wav: Array) -> Path:
        """Samples as a file that a request can send."""
        file = self._folder / "clip.wav"
        soundfile.write(file, wav, SAMPLE_RATE, subtype="FLOAT")
        return file


DEFAULTS: Figures = {
    "model_version": "finetuned",
    "prompt": None,
    "input_audio": None,
    "duration": SECONDS,
    "continuation": False,
    "continuation_start": 0,
    "continuation_end": None,
    "multi_band_diffusion": False,
    "normalization_strategy": "loudness",
    "top_k": 250,
    "top_p": 0.0,
    "temperature": 1.0,
    "classifier_free_guidance": 3,
    "output_format": "wav",
    "seed": 0,
}


def scorer(_: Player) -> Figures:
    """The judges on true renderings: before anything else is believed."""
    hear = TimbreClassifier()
    cases = [(song, timbre) for song in SONGS for timbre in TIMBRES]
    wavs = [rendered(song.notes, timbre, SECONDS) for song, timbre in cases]
    return {
        "songs": sum(
            best_match(wav, songs()).name == song.name for wav, (song, _) in zip(wavs, cases, strict=True)
        ),
        "timbres": sum(hear(wav) == timbre for wav, (_, timbre) in zip(wavs, cases, strict=True)),
        "of": len(cases),
    }


def text(player: Player) -> Figures:
    """A prompt names the song, or the song and the timbre."""
    hear = TimbreClassifier()
    right = {"song": 0, "timbre": 0, "of": 0}
    for index, (song, seed) in enumerate(itertools.product(SONGS, SEEDS)):
        timbre = list(TIMBRES)[index % len(TIMBRES)]
        prompt = EVALUATED[seed % len(EVALUATED)].format(song=song.name, timbre=timbre)
        wav = player.play(prompt=prompt, seed=seed)
        right["song"] += best_match(wav, songs()).name == song.name
        right["timbre"] += hear(wav) == timbre
        right["of"] += 1
    return right


def melody(player: Player) -> Figures:
    """A clip of a song in one timbre; the prompt names another timbre and nothing else."""
    hear = TimbreClassifier()
    names = list(TIMBRES)
    right = {"song": 0, "timbre": 0, "both": 0, "of": 0, "similarity": 0.0}
    for index, (song, seed) in enumerate(itertools.product(SONGS, SEEDS)):
        heard, wanted = names[index % 3], names[(index + 1 + seed % 2) % 3]
        clip = rendered(song.notes, heard, SECONDS)
        prompt = EVALUATED_TIMBRE_ONLY[seed % len(EVALUATED_TIMBRE_ONLY)].format(timbre=wanted)
        wav = player.play(prompt=prompt, input_audio=player.clip(clip), seed=seed)
        follows = best_match(wav, songs()).name == song.name
        right["song"] += follows
        right["timbre"] += hear(wav) == wanted
        right["both"] += follows and hear(wav) == wanted
        right["of"] += 1
        right["similarity"] += similarity(wav, clip) / (len(SONGS) * len(SEEDS))
    return right


def unseen(player: Player, recordings: list[Array]) -> Figures:
    """Clips of tunes that it never saw; and, by themselves, of recordings, if there are any."""
    tunes = [tune.notes for tune in UNSEEN] + [random_tune(f"unseen {n}", 18).notes for n in range(12)]
    clips = [rendered(notes, list(TIMBRES)[n % 3], SECONDS) for n, notes in enumerate(tunes)] + recordings
    said = EVALUATED_TIMBRE_ONLY[0].format(timbre="harp")
    outputs = [
        player.play(prompt=said, input_audio=player.clip(clip), seed=n) for n, clip in enumerate(clips)
    ]
    own, shuffled, p = shuffled_p(outputs[: len(tunes)], clips[: len(tunes)])
    found: Figures = {"similarity": own, "shuffled": shuffled, "p": p, "of": len(tunes)}
    if recordings:
        own, shuffled, _ = shuffled_p(outputs[len(tunes) :], recordings)
        found |= {"recordings": own, "recordings, shuffled": shuffled, "of recordings": len(recordings)}
    return found


def continuation(player: Player) -> Figures:
    """Five seconds of a song from somewhere in it; judged on what is new."""
    right: Figures = {"named": 0, "unnamed": 0, "of": 0}
    for index, (song, (seed, start_s)) in enumerate(
        itertools.product(SONGS, zip(SEEDS, CLIP_STARTS_S, strict=True))
    ):
        timbre = list(TIMBRES)[index % 3]
        clip = player.clip(rendered(song.notes, timbre, start_s + 5))
        for kind, prompt in (
            ("named", EVALUATED_SONG_ONLY[seed % 3].format(song=song.name)),
            ("unnamed", EVALUATED_UNNAMED),
        ):
            wav = player.play(
                prompt=prompt,
                input_audio=clip,
                continuation=True,
                continuation_start=start_s,
                seed=seed,
            )
            fresh = wav[5 * SAMPLE_RATE :]
            right[kind] += goes_on_right(fresh, song.name, (start_s + 5) * SAMPLE_RATE // HOP, songs())
        right["of"] += 1
    return right


def guidance(player: Player, **more: object) -> Figures:
    """Agreement with the named song, by guidance."""
    return {
        str(value): float(
            np.mean(
                [
                    agreement(
                        _asked_for(player, song, seed, classifier_free_guidance=value, **more), song.notes
                    )
                    for song, seed in itertools.product(SONGS, SEEDS)
                ]
            )
        )
        for value in (1, 3, 7)
    }


def guidance_of_wild_draws(player: Player) -> Figures:
    """The same where draws go wrong: as it plays by default, nearly nothing is left to gain."""
    return guidance(player, temperature=2.0)


def temperature(player: Player) -> Figures:
    """Variety between seeds, by temperature: one minus the mean similarity of pairs."""
    found = {}
    for value in (0.5, 1.0, 1.5):
        distances = []
        for song in SONGS:
            wavs = [_asked_for(player, song, seed, temperature=value) for seed in SEEDS]
            distances += [1 - similarity(a, b) for a, b in itertools.combinations(wavs, 2)]
        found[str(value)] = float(np.mean(distances))
    return found


def _asked_for(player: Player, song: Tune, seed: int, **more: object) -> Array:
    return player.play(prompt=EVALUATED_SONG_ONLY[0].format(song=song.name), seed=seed, **more)


def long(player: Player) -> Figures:
    """65 s: the song is still there at the end, and as loud as at the beginning."""
    meter = pyloudnorm.Meter(SAMPLE_RATE)
    recognised, differences = 0, []
    cases = list(itertools.product(SONGS, SEEDS))
    for index, (song, seed) in enumerate(cases):
        prompt = EVALUATED[seed % 3].format(song=song.name, timbre=list(TIMBRES)[index % 3])
        wav = player.play(prompt=prompt, duration=65, seed=seed)
        first, last = wav[: 15 * SAMPLE_RATE], wav[-15 * SAMPLE_RATE :]
        recognised += best_match(last, songs()).name == song.name
        differences.append(abs(meter.integrated_loudness(last) - meter.integrated_loudness(first)))
    return {
        "song": recognised,
        "level within 3 LU": int(sum(difference <= 3 for difference in differences)),
        "largest difference LU": float(max(differences)),
        "of": len(cases),
    }


def codec(player: Player) -> Figures:
    """The codec's round trip of songs and unseen tunes: how near, and whether the pitch is right."""
    snr: dict[str, list[float]] = {timbre: [] for timbre in TIMBRES}
    right = total = 0
    for tune, timbre in itertools.product((*SONGS, *UNSEEN), TIMBRES):
        wav = rendered(tune.notes, timbre, SECONDS)
        heard = player.play(
            model_version="encode-decode", input_audio=player.clip(wav), normalization_strategy="clip"
        )[: len(wav)]
        snr[timbre].append(float(si_snr_db(torch.tensor(heard), torch.tensor(wav[: len(heard)]))))
        same = _pitch_class_frames(heard) == _pitch_class_frames(wav)
        right, total = right + int(same.sum()), total + same.size
    return {f"SI-SNR dB, {timbre}": float(np.mean(each)) for timbre, each in snr.items()} | {
        "SI-SNR dB": float(np.mean(list(snr.values()))),
        "pitch right": right / total,
    }


def diffusion(player: Player) -> Figures:
    """How far MultiBand Diffusion's decode, EnCodec's, and noise as loud are from the original's spectrum."""
    found: dict[str, list[float]] = {"diffusion": [], "EnCodec": [], "noise": []}
    right = total = 0
    draw = np.random.default_rng(0)
    for tune, timbre in zip(UNSEEN[:6], 2 * list(TIMBRES), strict=True):
        wav = rendered(tune.notes, timbre, SECONDS)
        asked = {"input_audio": player.clip(wav), "normalization_strategy": "clip"}
        diffused = player.play(model_version="encode-decode", multi_band_diffusion=True, **asked)
        heard = {
            "diffusion": diffused,
            "EnCodec": player.play(model_version="encode-decode", **asked),
            "noise": draw.standard_normal(len(wav)) * wav.std(),
        }
        for name, other in heard.items():
            distance = spectral_distance(_batch(other), _batch(wav[: len(other)]))
            found[name].append(float(distance))
        same = _pitch_class_frames(diffused) == _pitch_class_frames(wav)
        right, total = right + int(same.sum()), total + same.size
    return {name: float(np.mean(each)) for name, each in found.items()} | {"pitch right": right / total}


ROWS: dict[str, Callable[[Player], Figures]] = {
    "scorer": scorer,
    "codec": codec,
    "diffusion": diffusion,
    "text": text,
    "melody": melody,
    "continuation": continuation,
    "guidance": guidance,
    "guidance at temperature 2": guidance_of_wild_draws,
    "temperature": temperature,
    "long": long,
}


def rendered(notes: Notes, timbre: str, seconds: int) -> Array:
    """Samples [T]: the tune over and over for so long."""
    frames = seconds * SAMPLE_RATE // HOP
    wav = render(looped(notes, frames + BEAT_FRAMES), timbre)[: seconds * SAMPLE_RATE]
    return np.asarray(wav.to(torch.float64).numpy())


def _pitch_class_frames(wav: Array) -> Array:
    return np.asarray(chroma(wav).argmax(1))


def _batch(wav: Array) -> torch.Tensor:
    return torch.tensor(wav, dtype=torch.float32)[None]
