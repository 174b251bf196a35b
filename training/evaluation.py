"""Measures what the demo model can do, through the service. Each row of the benchmark is one function."""

import asyncio
import contextlib
import io
import itertools
import sys
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
    continues_correctly,
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
"""The results of a row by their names."""


class Player:
    """Sends requests to a service in this process and returns the samples."""

    def __init__(self, weights: Path | None = None) -> None:
        """Starts a service. `weights`: its checkpoint; None: the one in the weights folder."""
        self._folder = Path(tempfile.mkdtemp())
        self._service = Service(Settings(output_grace_s=600.0))
        self._service.start(str(weights) if weights else None)

    def play(self, **fields: object) -> Array:
        """Runs one prediction with `DEFAULTS` and these fields, and returns its samples [T] at 32 kHz."""
        log = io.StringIO()  # a progress bar and some lines, which only matter if the prediction fails
        try:
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                path = asyncio.run(self._service.predict(DEFAULTS | fields, lambda name, value: None))
        except BaseException:
            print(log.getvalue(), file=sys.stderr)
            raise
        wav, rate = soundfile.read(path)
        assert rate == SAMPLE_RATE
        path.unlink()
        return np.asarray(wav, dtype=np.float64)

    def clip(self, wav: Array) -> Path:
        """Writes samples [T] at 32 kHz to the file of the next request's `input_audio`, and returns it."""
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
    """Counts the renderings in which the scoring itself recognizes song and timbre."""
    classify = TimbreClassifier()
    cases = [(song, timbre) for song in SONGS for timbre in TIMBRES]
    wavs = [rendered(song.notes, timbre, SECONDS) for song, timbre in cases]
    return {
        "songs": sum(
            best_match(wav, songs()).name == song.name for wav, (song, _) in zip(wavs, cases, strict=True)
        ),
        "timbres": sum(classify(wav) == timbre for wav, (_, timbre) in zip(wavs, cases, strict=True)),
        "of": len(cases),
    }


def text(player: Player) -> Figures:
    """Counts the pieces that are the song, and in the timbre, that the prompt names."""
    classify = TimbreClassifier()
    right = {"song": 0, "timbre": 0, "of": 0}
    for index, (song, seed) in enumerate(itertools.product(SONGS, SEEDS)):
        timbre = list(TIMBRES)[index % len(TIMBRES)]
        prompt = EVALUATED[seed % len(EVALUATED)].format(song=song.name, timbre=timbre)
        wav = player.play(prompt=prompt, seed=seed)
        right["song"] += best_match(wav, songs()).name == song.name
        right["timbre"] += classify(wav) == timbre
        right["of"] += 1
    return right


def melody(player: Player) -> Figures:
    """Counts the pieces that follow the clip of a song, in another timbre that the prompt names."""
    classify = TimbreClassifier()
    names = list(TIMBRES)
    right = {"song": 0, "timbre": 0, "both": 0, "of": 0, "similarity": 0.0}
    for index, (song, seed) in enumerate(itertools.product(SONGS, SEEDS)):
        given, wanted = names[index % 3], names[(index + 1 + seed % 2) % 3]
        clip = rendered(song.notes, given, SECONDS)
        prompt = EVALUATED_TIMBRE_ONLY[seed % len(EVALUATED_TIMBRE_ONLY)].format(timbre=wanted)
        wav = player.play(prompt=prompt, input_audio=player.clip(clip), seed=seed)
        follows = best_match(wav, songs()).name == song.name
        right["song"] += follows
        right["timbre"] += classify(wav) == wanted
        right["both"] += follows and classify(wav) == wanted
        right["of"] += 1
        right["similarity"] += similarity(wav, clip) / (len(SONGS) * len(SEEDS))
    return right


def unseen(player: Player, recordings: list[Array]) -> Figures:
    """Tests whether the model follows unseen tunes and, separately, recordings if there are any."""
    tunes = [tune.notes for tune in UNSEEN] + [random_tune(f"unseen {n}", 18).notes for n in range(12)]
    clips = [rendered(notes, list(TIMBRES)[n % 3], SECONDS) for n, notes in enumerate(tunes)] + recordings
    prompt = EVALUATED_TIMBRE_ONLY[0].format(timbre="harp")
    outputs = [
        player.play(prompt=prompt, input_audio=player.clip(clip), seed=n) for n, clip in enumerate(clips)
    ]
    own, shuffled, p = shuffled_p(outputs[: len(tunes)], clips[: len(tunes)])
    found: Figures = {"similarity": own, "shuffled": shuffled, "p": p, "of": len(tunes)}
    if recordings:
        own, shuffled, _ = shuffled_p(outputs[len(tunes) :], recordings)
        found |= {"recordings": own, "recordings, shuffled": shuffled, "of recordings": len(recordings)}
    return found


def continuation(player: Player) -> Figures:
    """Counts the correct continuations of 5 s of a song, from the beginning and from the middle of it.

    Only the new part is scored.
    """
    right: Figures = {"named": 0, "unnamed": 0, "of": 0}
    for index, (song, (seed, start_s)) in enumerate(
        itertools.product(SONGS, zip(SEEDS, CLIP_STARTS_S, strict=True))
    ):
        timbre = list(TIMBRES)[index % 3]
        clip = player.clip(rendered(song.notes, timbre, start_s + 5))
        for name, prompt in (
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
            new = wav[5 * SAMPLE_RATE :]
            right[name] += continues_correctly(new, song.name, (start_s + 5) * SAMPLE_RATE // HOP, songs())
        right["of"] += 1
    return right


def guidance(player: Player, **more: object) -> Figures:
    """Returns the mean agreement with the song that the prompt names, for several values of guidance."""
    return {
        str(value): float(
            np.mean(
                [
                    agreement(
                        _play_song(player, song, seed, classifier_free_guidance=value, **more), song.notes
                    )
                    for song, seed in itertools.product(SONGS, SEEDS)
                ]
            )
        )
        for value in (1, 3, 7)
    }


def guidance_at_temperature_2(player: Player) -> Figures:
    """Returns the same at temperature 2: at the default temperature there is little to improve."""
    return guidance(player, temperature=2.0)


def temperature(player: Player) -> Figures:
    """Returns the variety between seeds for several temperatures: 1 - the mean similarity of pairs."""
    found = {}
    for value in (0.5, 1.0, 1.5):
        distances = []
        for song in SONGS:
            wavs = [_play_song(player, song, seed, temperature=value) for seed in SEEDS]
            distances += [1 - similarity(a, b) for a, b in itertools.combinations(wavs, 2)]
        found[str(value)] = float(np.mean(distances))
    return found


def _play_song(player: Player, song: Tune, seed: int, **more: object) -> Array:
    """Runs a prediction whose prompt names a song, with `more` fields."""
    return player.play(prompt=EVALUATED_SONG_ONLY[0].format(song=song.name), seed=seed, **more)


def long(player: Player) -> Figures:
    """Counts the pieces of 65 s whose last 15 s are still the song, and as loud as the first 15 s."""
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
    """Measures the codec's round trip of songs and unseen tunes: signal-to-noise ratio and pitch."""
    snr: dict[str, list[float]] = {timbre: [] for timbre in TIMBRES}
    right = total = 0
    for tune, timbre in itertools.product((*SONGS, *UNSEEN), TIMBRES):
        wav = rendered(tune.notes, timbre, SECONDS)
        output = player.play(
            model_version="encode-decode", input_audio=player.clip(wav), normalization_strategy="clip"
        )[: len(wav)]
        snr[timbre].append(float(si_snr_db(torch.tensor(output), torch.tensor(wav[: len(output)]))))
        same = _pitch_class_frames(output) == _pitch_class_frames(wav)
        right, total = right + int(same.sum()), total + same.size
    return {f"SI-SNR dB, {timbre}": float(np.mean(each)) for timbre, each in snr.items()} | {
        "SI-SNR dB": float(np.mean(list(snr.values()))),
        "pitch right": right / total,
    }


def diffusion(player: Player) -> Figures:
    """Returns how far MultiBand Diffusion, EnCodec, and noise are from the spectrum of the original."""
    found: dict[str, list[float]] = {"diffusion": [], "EnCodec": [], "noise": []}
    right = total = 0
    draw = np.random.default_rng(0)
    for tune, timbre in zip(UNSEEN[:6], 2 * list(TIMBRES), strict=True):
        wav = rendered(tune.notes, timbre, SECONDS)
        asked = {"input_audio": player.clip(wav), "normalization_strategy": "clip"}
        diffused = player.play(model_version="encode-decode", multi_band_diffusion=True, **asked)
        outputs = {
            "diffusion": diffused,
            "EnCodec": player.play(model_version="encode-decode", **asked),
            "noise": draw.standard_normal(len(wav)) * wav.std(),
        }
        for name, other in outputs.items():
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
    "guidance at temperature 2": guidance_at_temperature_2,
    "temperature": temperature,
    "long": long,
}


def rendered(notes: Notes, timbre: str, seconds: int) -> Array:
    """Renders a tune, repeated for so many seconds: samples [T]."""
    frames = seconds * SAMPLE_RATE // HOP
    wav = render(looped(notes, frames + BEAT_FRAMES), timbre)[: seconds * SAMPLE_RATE]
    return np.asarray(wav.to(torch.float64).numpy())


def _pitch_class_frames(wav: Array) -> Array:
    """Returns the loudest pitch class of each chroma frame: samples [T] -> [S]."""
    return np.asarray(chroma(wav).argmax(1))


def _batch(wav: Array) -> torch.Tensor:
    """Returns samples [T] as a tensor [1, T] float32."""
    return torch.tensor(wav, dtype=torch.float32)[None]
