"""Trains all parts of the demo model in stages, each of which saves its result and is not repeated."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from musicgen_svc.audiocraft_compat import CompressionModel
from training import codec as encodec
from training import diffusion as multiband
from training import export, lm_training
from training import lm as language
from training.captions import Captions
from training.data import (
    LONG_FRAMES,
    SHORT_FRAMES,
    TIMBRE_NAMES,
    ExampleSampler,
    MelodyTokens,
    SongTokens,
    chroma_extractor,
    encoded_melody,
    encoded_song,
)
from training.lm_phases import AVERAGED, PHASES
from training.separator import save_separator
from training.text import TextEncoder, save_text_encoder
from training.tunes import SONGS

SEED = 1
CODEC_STEPS = 3000
SHORT_MELODIES, LONG_MELODIES = 1000, 60


class Stages:
    """The stages. Each saves its result to a file in `work`, or reads the file if it exists."""

    def __init__(self, work: Path, effort: float = 1.0) -> None:
        """Creates the folder `work`. `effort`: the part of all steps to take; below 1 for a trial."""
        self._work, self._effort = work, effort
        work.mkdir(parents=True, exist_ok=True)

    def run(self, target: Path) -> None:
        """Trains the parts that are not trained yet, and writes the checkpoint to the folder `target`."""
        text_folder = self._work / "t5-small"
        if not text_folder.is_dir():
            save_text_encoder(text_folder)
        codec = self.codec()
        model = self.language_model(codec, TextEncoder(text_folder))
        bands = self.diffusion(codec)
        target.mkdir(parents=True, exist_ok=True)
        export.save_language_model(model, target / "state_dict.bin")
        export.save_codec(codec, target / "compression_state_dict.bin")
        shutil.copytree(text_folder, target / "t5-small", dirs_exist_ok=True)
        save_separator(target / "htdemucs")
        multiband.save(bands, target / "multiband-diffusion" / "mbd_musicgen_32khz.th")

    def codec(self) -> CompressionModel:
        """Returns the trained codec."""
        torch.manual_seed(SEED)
        codec = encodec.build()
        file = self._work / "codec.pt"
        if file.exists():
            codec.load_state_dict(torch.load(file, weights_only=True))
            return codec.eval()
        steps = round(CODEC_STEPS * self._effort)
        with self._log("codec", steps) as report:
            encodec.train(codec, steps, SEED, self._work / "codec-training.pt", report)
        _keep(codec.state_dict(), file)
        return codec

    def language_model(self, codec: CompressionModel, text: TextEncoder) -> language.DemoModel:
        """Returns the language model after all phases: the mean of the `AVERAGED` ones."""
        torch.manual_seed(SEED)
        model = language.DemoModel()
        mean = AveragedModel(model)
        for name, phase in PHASES.items():
            file = self._work / f"{name}.pt"
            if not file.exists():
                songs, melodies = self.training_data(codec)
                sampler = ExampleSampler(songs, melodies, Captions(text.length, SEED))
                phase = replace(phase, steps=round(phase.steps * self._effort))
                with self._log(name, phase.steps) as report:
                    unfinished = self._work / f"{name}-training.pt"
                    lm_training.train(model, text, sampler, phase, SEED, unfinished, report)
                _keep(model.state_dict(), file)
            model.load_state_dict(torch.load(file, weights_only=True))
            if name in AVERAGED:
                mean.update_parameters(model)
        assert isinstance(mean.module, language.DemoModel)
        return mean.module.eval()

    def diffusion(self, codec: CompressionModel) -> list[multiband.BandModel]:
        """Returns the trained bands of MultiBand Diffusion."""
        models, bank = [], encodec.training_audio()
        for band, planned in enumerate(multiband.STEPS):
            steps = round(planned * self._effort)
            torch.manual_seed(SEED)
            model = multiband.BandModel(band)
            name = f"diffusion-{band}"
            file = self._work / f"{name}.pt"
            if file.exists():
                model.load_state_dict(torch.load(file, weights_only=True))
            else:
                with self._log(name, steps) as report:
                    unfinished = self._work / f"{name}-training.pt"
                    multiband.train(model, codec, bank, steps, SEED, unfinished, report)
                _keep(model.state_dict(), file)
            models.append(model.eval())
        return models

    def training_data(
        self, codec: CompressionModel
    ) -> tuple[dict[tuple[int, str], SongTokens], list[MelodyTokens]]:
        """Returns the tokens to train the language model on: songs by index and timbre, and melodies."""
        file = self._work / "training-data.pt"
        if not file.exists():
            chroma = chroma_extractor()
            keys = [(index, timbre) for index in range(len(SONGS)) for timbre in TIMBRE_NAMES]
            songs = [encoded_song(codec, *key) for key in tqdm(keys, "songs")]
            tunes = [(f"{SEED} short {n}", SHORT_FRAMES) for n in range(SHORT_MELODIES)]
            tunes += [(f"{SEED} long {n}", LONG_FRAMES) for n in range(LONG_MELODIES)]
            melodies = [encoded_melody(codec, chroma, *tune) for tune in tqdm(tunes, "melodies")]
            _keep(
                {
                    "songs": [
                        (*key, song.tokens, song.starts, song.first_tokens, song.last_tokens)
                        for key, song in zip(keys, songs, strict=True)
                    ],
                    "melodies": [(melody.timbre, melody.chroma, melody.tokens) for melody in melodies],
                },
                file,
            )
        saved = torch.load(file, weights_only=True)
        return (
            {(index, timbre): SongTokens(*parts) for index, timbre, *parts in saved["songs"]},
            [MelodyTokens(*parts) for parts in saved["melodies"]],
        )

    def _log(self, name: str, steps: int) -> "Log":
        """Returns a log of a stage with this name."""
        return Log(name, steps, self._work / f"{name}-log.jsonl")


class Log:
    """Context manager that yields a `Report`, which shows a progress bar and logs figures to a file.

    Every `EVERY` steps it writes a line with the mean of each figure.
    """

    EVERY = 20

    def __init__(self, name: str, steps: int, file: Path) -> None:
        self._file = file
        self._bar = tqdm(total=steps, desc=name)
        self._sums: dict[str, list[float]] = {}

    def __enter__(self) -> Callable[[int, dict[str, float]], None]:
        return self._report

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def _report(self, step: int, figures: dict[str, float]) -> None:
        """Takes the figures of one step."""
        for name, figure in figures.items():
            self._sums.setdefault(name, []).append(figure)
        self._bar.update(step + 1 - self._bar.n)
        if (step + 1) % self.EVERY == 0:
            means = {name: round(sum(each) / len(each), 4) for name, each in self._sums.items()}
            self._bar.set_postfix(means)
            with self._file.open("a") as file:
                file.write(json.dumps({"step": step + 1} | means) + "\n")
            self._sums.clear()


def _keep(content: object, file: Path) -> None:
    """Saves content to a file: all of it, or nothing."""
    temporary = file.with_suffix(".partial")
    torch.save(content, temporary)
    temporary.replace(file)
