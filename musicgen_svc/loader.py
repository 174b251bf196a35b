"""Names -> models on the device. One language model is resident; another replaces it on demand."""

import gc
import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from musicgen_svc.building import (
    build_codec,
    build_lm,
    build_melody_conditioner,
    build_text_conditioner,
    build_transformers_codec,
    conditioner_names,
    wrap_codec,
)
from musicgen_svc.catalog import DIFFUSION_FILE, LM_FILE
from musicgen_svc.checkpoints.audiocraft_export import Checkpoint, CodecPointer, read_codec, read_lm
from musicgen_svc.codec import Codec
from musicgen_svc.conditioning import MELODY, TEXT, Conditioner, Separate
from musicgen_svc.diffusion import MultiBandDiffusion, load_bands
from musicgen_svc.engine.engine import Engine
from musicgen_svc.errors import InputError
from musicgen_svc.randomness import GlobalRandom
from musicgen_svc.separation import Separator, load_separator
from musicgen_svc.settings import Settings
from musicgen_svc.ticks import Tick, no_tick
from musicgen_svc.weights import FINETUNED, Weights

ENCODEC = "encodec_32khz"
DEMUCS = "htdemucs"
DIFFUSION = "multiband-diffusion"


@dataclass(frozen=True)
class Model:
    """A checkpoint, ready to generate."""

    name: str
    folder: Path
    content_hash: str
    """sha256 of the language model's file."""
    window_s: float
    """The longest stretch that it was trained on."""
    conditioner: Conditioner
    engine: Engine
    codec: Codec

    @property
    def window(self) -> int:
        """`window_s` in frames."""
        return int(self.window_s * self.codec.frame_rate)


class Loader:
    """Loads on demand and keeps what was asked for last. Only the device's own thread calls it."""

    def __init__(self, weights: Weights, device: torch.device, settings: Settings) -> None:
        self._weights = weights
        self.device = device
        self._settings = settings
        self._resident: Model | None = None
        self._codecs: dict[Path, Codec] = {}
        self._separators: dict[Path, Separator] = {}
        self._diffusion: tuple[Codec, MultiBandDiffusion] | None = None

    def start(self) -> Model:
        """Loads `finetuned`, or where there is none, the first base model that is present.

        Raises:
            WeightsError: there is neither, or what is there does not load.
        """
        base = self._weights.base_models()
        return self.model(FINETUNED if self._weights.finetuned or not base else base[0])

    def model(self, name: str) -> Model:
        """The model called `name`, loaded in place of another one if need be.

        Raises:
            WeightsError: it is absent or does not load.
        """
        if self._resident is None or self._resident.name != name:
            folder = self._weights.model(name)
            self._evict()
            self._resident = self._load(name, folder)
        return self._resident

    def takes_melody(self, name: str) -> bool:
        """Whether the model follows a melody, without loading it."""
        if self._resident is not None and self._resident.name == name:
            return self._resident.conditioner.takes_melody
        return MELODY in conditioner_names(read_lm(self._weights.model(name)).config)

    def melody_models(self) -> list[str]:
        """The names of the models that follow a melody."""
        base = [n for n, source in self._weights.catalog.models.items() if DEMUCS in source.needs]
        own = [FINETUNED] if self._weights.finetuned and self.takes_melody(FINETUNED) else []
        return base + own

    def codec(self) -> tuple[Path, Codec]:
        """The codec for encode-decode and its folder: the first present base model's, else `finetuned`'s.

        Raises:
            WeightsError: neither is there.
        """
        name = next(iter(self._weights.base_models()), FINETUNED)
        folder = self._weights.model(name)
        return folder, self._codec(folder, read_lm(folder))

    def diffusion(self, folder: Path, codec: Codec) -> MultiBandDiffusion:
        """MultiBand Diffusion for the codec of the checkpoint in `folder`.

        Raises:
            InputError: the diffusion weights belong to another codec.
            WeightsError: there are none.
        """
        if self._diffusion is None or self._diffusion[0] is not codec:
            place = self._weights.component(DIFFUSION, folder)
            if place.parent != folder and codec.fingerprint() not in self._fingerprints(place.parent):
                raise InputError(
                    f"multi_band_diffusion is true, but {folder.name} has a codec of its own and the "
                    "diffusion decoder fits only the one that it was trained for: set it to false."
                )
            bands = load_bands(place / DIFFUSION_FILE, self.device)
            self._diffusion = codec, MultiBandDiffusion(bands, codec, self._settings.diffusion_window_s)
        return self._diffusion[1]

    def _load(self, name: str, folder: Path) -> Model:
        checkpoint = read_lm(folder)
        config = checkpoint.config
        names = conditioner_names(config)
        codec = self._codec(folder, checkpoint)
        t5_folder = self._weights.component(config.conditioners[TEXT].t5.name.rsplit("/", 1)[-1], folder)
        text = build_text_conditioner(config, t5_folder, self.device)
        melody = None
        if MELODY in names:
            separate = self._separate_with(self._weights.component(DEMUCS, folder), codec.sample_rate)
            melody = build_melody_conditioner(config, separate, codec.sample_rate, self.device)
        conditioner = Conditioner(text, melody)
        lm = build_lm(checkpoint, conditioner, self.device)
        engine = Engine(lm, graphs=self._settings.cuda_graphs)
        with (folder / LM_FILE).open("rb") as file:
            content_hash = hashlib.file_digest(file, "sha256").hexdigest()
        window_s = float(config.dataset.segment_duration)
        return Model(name, folder, content_hash, window_s, conditioner, engine, codec)

    def _codec(self, folder: Path, lm: Checkpoint) -> Codec:
        if folder not in self._codecs:
            codec = read_codec(folder)
            if isinstance(codec, CodecPointer):
                built = build_transformers_codec(self._weights.component(codec.name, folder), self.device)
            else:
                built = build_codec(codec, self.device)
            self._codecs[folder] = Codec(wrap_codec(built, lm.config))
        return self._codecs[folder]

    def _separate_with(self, folder: Path, sample_rate: int) -> Separate:
        """Demucs, loaded when a melody is first heard."""

        def separate(audio: torch.Tensor, tick: Tick = no_tick) -> torch.Tensor:
            if folder not in self._separators:
                # Building a model draws from the global generators, which are the request's by now.
                with GlobalRandom(0, self.device).pinned():
                    self._separators[folder] = load_separator(folder, sample_rate, self.device)
            return self._separators[folder](audio, tick)

        return separate

    def _fingerprints(self, folder: Path) -> set[str]:
        """The codecs that lie in a folder of weights, which its diffusion decoder was trained for."""
        cpu = torch.device("cpu")
        models = [folder / name for name in self._weights.catalog.models if (folder / name).is_dir()]
        own = [read_codec(model) for model in models]
        builders = [partial(build_codec, codec, cpu) for codec in own if isinstance(codec, Checkpoint)]
        if (folder / ENCODEC).is_dir():
            builders.append(partial(build_transformers_codec, folder / ENCODEC, cpu))
        return {Codec(build()).fingerprint() for build in builders}

    def _evict(self) -> None:
        """Lets go of the resident model before the next one comes in: both at once may not fit."""
        if self._resident is None:
            return
        self._codecs.pop(self._resident.folder, None)
        self._resident = self._diffusion = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
