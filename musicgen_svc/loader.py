"""Names -> models on the device. One language model is resident; another replaces it on demand."""

import gc
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig

from musicgen_svc.building import (
    build_codec,
    build_lm,
    build_melody_conditioner,
    build_text_conditioner,
    build_transformers_codec,
    conditioner_names,
    wrap_codec,
)
from musicgen_svc.catalog import DIFFUSION_FILE
from musicgen_svc.checkpoints import (
    Checkpoint,
    CodecPointer,
    OpenedCheckpoint,
    TransformersPart,
    open_checkpoint,
)
from musicgen_svc.checkpoints.opened import component_name
from musicgen_svc.codec import Codec
from musicgen_svc.compat import CompressionModel
from musicgen_svc.conditioning import MELODY, TEXT, Conditioner, Separate, TextConditioner
from musicgen_svc.diffusion import MultiBandDiffusion, load_bands
from musicgen_svc.engine.engine import Engine
from musicgen_svc.errors import InputError, WeightsError
from musicgen_svc.randomness import GlobalRandom
from musicgen_svc.separation import Separator, load_separator
from musicgen_svc.settings import Settings
from musicgen_svc.ticks import Tick, no_tick
from musicgen_svc.weights import FINETUNED, UNPACKED, Weights

ENCODEC = "encodec_32khz"
DEMUCS = "htdemucs"
DIFFUSION = "multiband-diffusion"
TOKENIZER_FILES = ("tokenizer.json", "spiece.model")


@dataclass(frozen=True)
class Model:
    """A checkpoint, ready to generate."""

    name: str
    place: Path
    """The file or folder that it was loaded from."""
    format: str
    content_hash: str
    """sha256 of the language model's file or files."""
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
            opened = self._open(self._weights.model(name))
            self._evict()
            self._resident = self._load(name, opened)
        return self._resident

    def takes_melody(self, name: str) -> bool:
        """Whether the model follows a melody, without loading it."""
        if self._resident is not None and self._resident.name == name:
            return self._resident.conditioner.takes_melody
        return MELODY in conditioner_names(self._open(self._weights.model(name)).config())

    def melody_models(self) -> list[str]:
        """The names of the models that follow a melody."""
        base = [n for n, source in self._weights.catalog.models.items() if DEMUCS in source.needs]
        own = [FINETUNED] if self._weights.finetuned and self.takes_melody(FINETUNED) else []
        return base + own

    def codec(self) -> tuple[Path, Codec]:
        """The codec for encode-decode and its place: the first present base model's, else `finetuned`'s.

        Raises:
            WeightsError: neither is there.
        """
        opened = self._open(self._weights.model(next(iter(self._weights.base_models()), FINETUNED)))
        return opened.path, self._codec(opened, opened.config())

    def diffusion(self, place: Path, codec: Codec) -> MultiBandDiffusion:
        """MultiBand Diffusion for the codec of the checkpoint at `place`.

        Raises:
            InputError: the diffusion weights belong to another codec.
            WeightsError: there are none.
        """
        if self._diffusion is None or self._diffusion[0] is not codec:
            folder = self._weights.component(DIFFUSION, place)
            if folder.parent != place and codec.fingerprint() not in self._fingerprints(folder.parent):
                raise InputError(
                    f"multi_band_diffusion is true, but {place.name} has a codec of its own and the "
                    "diffusion decoder fits only the one that it was trained for: set it to false."
                )
            bands = load_bands(folder / DIFFUSION_FILE, self.device)
            self._diffusion = codec, MultiBandDiffusion(bands, codec, self._settings.diffusion_window_s)
        return self._diffusion[1]

    def _open(self, path: Path) -> OpenedCheckpoint:
        """A checkpoint in whatever format; nothing of it is read yet."""
        return open_checkpoint(
            path,
            base=self._weights.base,
            strength=self._settings.lora_strength,
            cache=self._weights.folder / UNPACKED,
        )

    def _load(self, name: str, opened: OpenedCheckpoint) -> Model:
        config = opened.config()
        names = conditioner_names(config)
        codec = self._codec(opened, config)
        _check_codec(opened, config, codec)
        text = self._text_conditioner(opened, config)
        melody = None
        if MELODY in names:
            separate = self._separate_with(self._weights.component(DEMUCS, opened.path), codec.sample_rate)
            melody = build_melody_conditioner(config, separate, codec.sample_rate, self.device)
        conditioner = Conditioner(text, melody)
        lm = build_lm(opened.lm(), conditioner, self.device)
        return Model(
            name=name,
            place=opened.path,
            format=opened.format,
            content_hash=opened.content_hash(),
            window_s=float(config.dataset.segment_duration),
            conditioner=conditioner,
            engine=Engine(lm, graphs=self._settings.cuda_graphs),
            codec=codec,
        )

    def _text_conditioner(self, opened: OpenedCheckpoint, config: DictConfig) -> TextConditioner:
        """T5 from inside the checkpoint, if it brings one, else by the name in its configuration."""
        encoder = opened.text_encoder()
        if encoder is not None and any((opened.path / name).is_file() for name in TOKENIZER_FILES):
            return build_text_conditioner(config, encoder, opened.path, self.device)
        folder = self._weights.component(component_name(config.conditioners[TEXT].t5.name), opened.path)
        return build_text_conditioner(config, encoder or folder, folder, self.device)

    def _codec(self, opened: OpenedCheckpoint, config: DictConfig) -> Codec:
        if opened.path not in self._codecs:
            built = self._built_codec(opened, opened.codec(), self.device)
            self._codecs[opened.path] = Codec(wrap_codec(built, config))
        return self._codecs[opened.path]

    def _built_codec(
        self,
        opened: OpenedCheckpoint,
        codec: Checkpoint | CodecPointer | TransformersPart,
        device: torch.device,
    ) -> CompressionModel:
        if isinstance(codec, Checkpoint):
            return build_codec(codec, device)
        if isinstance(codec, CodecPointer):
            return build_transformers_codec(self._weights.component(codec.name, opened.path), device)
        return build_transformers_codec(codec, device)

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
        opened = [self._open(model) for model in models]
        built = [self._built_codec(checkpoint, checkpoint.codec(), cpu) for checkpoint in opened]
        if (folder / ENCODEC).is_dir():
            built.append(build_transformers_codec(folder / ENCODEC, cpu))
        return {Codec(codec).fingerprint() for codec in built}

    def _evict(self) -> None:
        """Lets go of the resident model before the next one comes in: both at once may not fit."""
        if self._resident is None:
            return
        self._codecs.pop(self._resident.place, None)
        self._resident = self._diffusion = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _check_codec(opened: OpenedCheckpoint, config: DictConfig, codec: Codec) -> None:
    """A language model speaks the tokens of one codec only."""
    wanted = (config.transformer_lm.n_q, config.transformer_lm.card)
    if wanted != (codec.codebooks, codec.cardinality):
        raise WeightsError(
            f"The {opened.format} {opened.path} was trained for {wanted[0]} codebooks of {wanted[1]} "
            f"entries, and its codec has {codec.codebooks} of {codec.cardinality}."
        )
