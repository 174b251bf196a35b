"""The loader: a model's name -> modules on the device.

A name is loaded in six steps: its path (`weights/`), the opened checkpoint (`opener.py`), the specs of its
parts (`parts.py`), their entries in the cache, room for all of them (`cache.py`), and only then the modules.
"""

import weakref
from pathlib import Path
from typing import Any, cast

import torch

from musicgen_svc.audiocraft_compat import CompressionModel
from musicgen_svc.checkpoints import OpenedCheckpoint
from musicgen_svc.engine.engine import Engine
from musicgen_svc.engine.factory import Switch, batch_for
from musicgen_svc.engine.memory import engine_bytes
from musicgen_svc.engine.projections import Precision
from musicgen_svc.errors import InputError, WeightsError
from musicgen_svc.loading import memory_budget, parts
from musicgen_svc.loading.cache import Entry, ModelCache, Spec
from musicgen_svc.loading.contents import DIFFUSION, Contents
from musicgen_svc.loading.file_hashes import FileState
from musicgen_svc.loading.model import Model
from musicgen_svc.loading.opener import Opener
from musicgen_svc.loading.warm_up import warm_up_codec, warm_up_diffusion, warm_up_model
from musicgen_svc.models.conditioners import (
    MELODY,
    Separate,
    build_conditioner,
    conditioner_names,
)
from musicgen_svc.models.diffusion_bands import Band
from musicgen_svc.models.encodec import Codec
from musicgen_svc.models.encodec_builder import adapted, codec_for
from musicgen_svc.models.language_model import LazyLM
from musicgen_svc.models.multiband_diffusion import MultiBandDiffusion
from musicgen_svc.runtime.fair_queue import FairQueue
from musicgen_svc.runtime.threads import ComputeThreads
from musicgen_svc.runtime.ticks import Tick, no_tick
from musicgen_svc.settings import Settings
from musicgen_svc.weights.catalog import DIFFUSION_FILE
from musicgen_svc.weights.paths import FINETUNED, Weights

WITH_DIFFUSION = "MultiBand Diffusion together with the model or codec whose tokens it decodes"


class Loader:
    """Loads models on demand, and keeps those that fit into the memory budget.

    A thread must hold the device whenever it calls a method other than `in_memory`. The model in use is the
    one that was asked for last. Requests that generate at the same time are for this model: a request for
    another model asks for it only after they have ended.
    """

    def __init__(
        self, weights: Weights, device: torch.device, settings: Settings,
        device_queue: FairQueue | None = None,
    ) -> None:  # fmt: skip
        """Makes a loader that has loaded nothing yet.

        Args:
            weights: where the files of the models are.
            device: where the models will run.
            settings: the memory budget, the number of slots, and how models are decoded.
            device_queue: what the engines acquire whenever they use the device.
        """
        self.device = device
        self.slots = min(settings.slots or memory_budget.slots(device), settings.max_concurrency)
        self.threads = ComputeThreads(user_chose=bool(settings.omp_num_threads))
        self._weights = weights
        self._settings = settings
        self._device_queue = device_queue
        self._opener = Opener(weights, settings.lora_strength)
        self._cache = ModelCache(memory_budget.budget(device, settings.memory_budget_gb), device)
        self.contents = Contents(weights, self._opener, self._cache.hashes)
        self._models: dict[str, Entry[Model]] = {}
        self._name_in_use = ""
        self._encode_decode: tuple[Entry[CompressionModel], weakref.ref[Codec]] | None = None
        self._known_to_fit: set[tuple[FileState, str]] = set()

    def start(self) -> Model:
        """Loads the user's own `finetuned`, else the first base model that is present, else the demo model.

        Raises:
            WeightsError: none of them is present, or the model does not load or is larger than the budget.
        """
        own = self._weights.finetuned and not self._weights.is_demo
        base = self._weights.base_models()
        return self.model(FINETUNED if own or not base else base[0])

    def model(self, name: str) -> Model:
        """Returns the model called `name`. Loads it if needed, and then evicts others if there is no room.

        Raises:
            WeightsError: the model is absent, does not load, or is larger than the budget.
        """
        entry = self._current(name)
        new = entry is None
        if entry is None:
            with self._opener.loading(name) as opened:
                entry = self._models[name] = self._load(name, opened)
        self._name_in_use = name
        model = self._cache.get(entry)
        if new:
            warm_up_model(model, self.device)
        return model

    def in_memory(self, name: str) -> bool:
        """Whether the model called `name` is in memory. May be called at any time, by any thread."""
        entry = self._models.get(name)
        return entry is not None and entry.in_memory

    def takes_melody(self, name: str) -> bool:
        """Returns whether the model follows a melody, without loading it.

        Raises:
            WeightsError: the model is absent, or its configuration cannot be read.
        """
        if entry := self._current(name):
            return entry.value().conditioner.takes_melody
        return MELODY in self._opener.read(name, lambda opened: conditioner_names(opened.config()))

    def melody_models(self) -> list[str]:
        """Returns the names of the models that follow a melody."""
        base = [n for n, source in self._weights.catalog.models.items() if parts.DEMUCS in source.needs]
        own = [FINETUNED] if self._weights.finetuned and self.takes_melody(FINETUNED) else []
        return base + own

    def codec_model(self) -> str:
        """Returns the model whose codec is that of encode-decode: the first base model, else `finetuned`."""
        return next(iter(self._weights.base_models()), FINETUNED)

    def codec(self) -> tuple[Path, Codec]:
        """Returns the codec for encode-decode, and the path of its checkpoint.

        Raises:
            WeightsError: no model is present, or the codec does not load.
        """
        with self._opener.loading(self.codec_model()) as opened:
            config = opened.config()
            entry = self._cache.entry(parts.codec_spec(self._weights, opened, config, self.device))
            # Requests may be generating with the model in use. It is evicted only if nothing else is left.
            self._cache.make_room(f"The codec of {opened.path.name}", [entry], evict_last=self._in_use())
            new = not entry.in_memory
            codec = Codec(adapted(self._cache.get(entry), config))
        if new:
            warm_up_codec(codec, self.device)
        self._encode_decode = entry, weakref.ref(codec)
        return opened.path, codec

    def diffusion(self, checkpoint: Path, codec: Codec) -> MultiBandDiffusion:
        """Returns MultiBand Diffusion for the codec of the checkpoint at a path.

        Raises:
            InputError, WeightsError: as `diffusion_weights`.
        """
        bands = self.diffusion_weights(checkpoint, codec)
        keep, evict_last = self._beside_diffusion(codec)
        self._cache.make_room(WITH_DIFFUSION, [bands], keep=keep, evict_last=evict_last)
        new = not bands.in_memory
        diffusion = MultiBandDiffusion(self._cache.get(bands), codec, self._settings.diffusion_window_s)
        if new:
            warm_up_diffusion(diffusion, codec, self.device)
        return diffusion

    def diffusion_weights(self, checkpoint: Path, codec: Codec) -> Entry[list[Band]]:
        """Returns the entry of what `diffusion` loads, and loads nothing.

        It is called before the tokens are generated, so that a request fails early.

        Raises:
            InputError: the diffusion weights belong to another codec, or do not fit into the budget beside
                the model.
            WeightsError: there are no diffusion weights, or they are damaged.
        """
        folder = self._weights.part_path(DIFFUSION, checkpoint)
        file = folder / DIFFUSION_FILE
        bands = self._cache.entry(parts.diffusion_spec(file, self.device))
        if folder.parent != checkpoint and not self._fits(file, codec):
            raise InputError(
                f"multi_band_diffusion is true, but {checkpoint.name} has a codec of its own and the "
                "diffusion decoder fits only the one that it was trained for: set it to false."
            )
        keep, _ = self._beside_diffusion(codec)
        try:
            self._cache.check_room(WITH_DIFFUSION, [bands], keep)
        except WeightsError as exc:
            raise InputError(f"multi_band_diffusion is true, but {exc}") from exc
        return bands

    def _fits(self, diffusion: Path, codec: Codec) -> bool:
        """Returns whether a codec equals one of those that are beside the diffusion weights."""
        pair = FileState.of(diffusion), codec.fingerprint()
        if pair not in self._known_to_fit and pair[1] in parts.codec_fingerprints(
            self._weights, diffusion.parent.parent, self._opener.open_path
        ):
            self._known_to_fit.add(pair)
        return pair in self._known_to_fit

    def _beside_diffusion(self, codec: Codec) -> tuple[list[Entry[Any]], list[Entry[Any]]]:
        """Returns the entries to keep while diffusion decodes for a codec, and those to evict last."""
        in_use = self._in_use()
        if any(model.value().codec is codec for model in in_use):
            return in_use, []
        if self._encode_decode and self._encode_decode[1]() is codec:
            return [self._encode_decode[0]], in_use
        return [], in_use

    def _in_use(self) -> list[Entry[Any]]:
        """Returns the entry of the model in use as a list; an empty list if it is not in memory."""
        entry = self._models.get(self._name_in_use)
        return [entry] if entry and entry.in_memory else []

    def _current(self, name: str) -> Entry[Model] | None:
        """Returns the model's entry if it is in memory and none of its files has been replaced, else None."""
        entry = self._models.get(name)
        return entry if entry and entry.in_memory and entry.unchanged else None

    def _load(self, name: str, opened: OpenedCheckpoint) -> Entry[Model]:
        """Loads a model and those of its parts that are not in memory.

        Raises:
            WeightsError: it does not load, or is larger than the budget.
        """
        config = opened.config()
        specs = parts.specs_of(self._weights, opened, config, self.device)
        codec, text = self._cache.entry(specs.codec), self._cache.entry(specs.text)
        lm = LazyLM(config, f"The {opened.format} {opened.path}", self.device)
        slots, precision = self.slots, self._settings.precision
        spec = Spec(
            "model",
            (*self._opener.files, *specs.codec.files, *specs.text.files),
            size=lambda: lm.size + engine_bytes(config, self.device, slots=slots, precision=precision),
            build=lambda: self._assemble(name, opened, lm, codec.value(), text.value()),
        )
        model = Entry(spec, parts=(codec, text))
        needed: list[Entry[Any]] = [model]
        if specs.separator:  # Demucs is built at the first melody, but there must be room for it
            needed.append(self._cache.entry(specs.separator))
        beside = "its codec, T5 and Demucs" if specs.separator else "its codec and T5"
        self._cache.make_room(f"model_version {name!r} with {beside}", needed)
        self._cache.get(model)
        return model

    def _assemble(
        self, name: str, opened: OpenedCheckpoint, lazy_lm: LazyLM, shared: CompressionModel, text: parts.Text
    ) -> Model:
        """Builds a model's own modules around its parts, and the engine that decodes it."""
        config = lazy_lm.config
        codec = codec_for(config, shared, f"The {opened.format} {opened.path}")
        separate = self._separate_with(opened.path, codec.sample_rate)
        conditioner = build_conditioner(
            config, text.encoder, text.tokenizer, separate, codec.sample_rate, self.device
        )
        batch = batch_for(
            lazy_lm.open(opened.lm(), conditioner),
            slots=self.slots,
            precision=cast(Precision, self._settings.precision),
            graphs=cast(Switch, self._settings.cuda_graphs),
            kernels=cast(Switch, self._settings.gpu_kernels),
            load_weights=lazy_lm.loaded,
        )
        return Model(
            name=name,
            path=opened.path,
            format=opened.format,
            window_s=float(config.dataset.segment_duration),
            conditioner=conditioner,
            engine=Engine(batch, self._device_queue),
            codec=codec,
            threads=self.threads.for_model(lazy_lm.parameter_count),
            hash=self._cache.hashes.content_later(opened.files),
        )

    def _separate_with(self, checkpoint: Path, sample_rate: int) -> Separate:
        """Returns a function that runs Demucs, and loads it whenever it is not in memory."""

        def separate(audio: torch.Tensor, tick: Tick = no_tick) -> torch.Tensor:
            folder = self._weights.part_path(parts.DEMUCS, checkpoint)
            separator = self._cache.entry(parts.separator_spec(folder, sample_rate, self.device))
            self._cache.make_room("Demucs beside the model", [separator], keep=self._in_use())
            return self._cache.get(separator)(audio, tick)

        return separate
