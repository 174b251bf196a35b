"""Names -> models on the device: which of them stay there, and what they are put together from."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from musicgen_svc.audiocraft_compat import CompressionModel
from musicgen_svc.checkpoints import OpenedCheckpoint
from musicgen_svc.engine.engine import Engine
from musicgen_svc.engine.factory import Switch, batch_for
from musicgen_svc.engine.projections import Precision
from musicgen_svc.errors import InputError, WeightsError
from musicgen_svc.loading import parts as components
from musicgen_svc.loading.cache import Draft, Item, Recipe, Store
from musicgen_svc.loading.file_hashes import FileState
from musicgen_svc.loading.lru_budget import DoesNotFit
from musicgen_svc.loading.memory_budget import GB, budget
from musicgen_svc.loading.model import Model, check_codec, engine_bytes
from musicgen_svc.loading.opener import Opener
from musicgen_svc.loading.parts import Text
from musicgen_svc.models.building import (
    LMDraft,
    build_melody_conditioner,
    conditioner_names,
    draft_lm,
    wrap_codec,
)
from musicgen_svc.models.conditioners import MELODY, Conditioner, Separate, TextConditioner
from musicgen_svc.models.demucs import Separator
from musicgen_svc.models.diffusion_bands import Band
from musicgen_svc.models.encodec import Codec
from musicgen_svc.models.multiband_diffusion import MultiBandDiffusion
from musicgen_svc.runtime.fair_queue import FairQueue
from musicgen_svc.runtime.ticks import Tick, no_tick
from musicgen_svc.settings import Settings
from musicgen_svc.weights.catalog import DIFFUSION_FILE
from musicgen_svc.weights.paths import FINETUNED, Weights

__all__ = ["Loader", "Model"]

DEMUCS = "htdemucs"
DIFFUSION = "multiband-diffusion"
WITH_DIFFUSION = "MultiBand Diffusion beside what it decodes for"


@dataclass(frozen=True)
class _Loaded:
    """A model and the parts that it shares with others."""

    model: Item[Model]
    parts: tuple[Item[CompressionModel], Item[Text]]
    files: tuple[FileState, ...]
    """Of the model itself, the archive around them, and its parts, wherever an equal one was loaded from."""

    @property
    def items(self) -> tuple[Item[Model], Item[CompressionModel], Item[Text]]:
        """What a model is made of is used after it, and so outlives it."""
        return self.model, *self.parts

    @property
    def stands(self) -> bool:
        """Whether its files are still those that it was loaded from, and on a CPU may lie in."""
        return all(file.stands for file in self.files)


class Loader:
    """Loads on demand, and keeps what the memory budget has room for. Called only while the caller holds the
    device.

    In use is the model that was asked for last: requests for one model run together, and a request for
    another one asks when they have ended.
    """

    def __init__(
        self,
        weights: Weights,
        device: torch.device,
        settings: Settings,
        device_queue: FairQueue | None = None,
    ) -> None:
        """`device_queue`: what the engines acquire whenever they use the device."""
        self._weights = weights
        self._device_queue = device_queue
        self.device = device
        self._settings = settings
        self._store = Store(budget(device, settings.memory_budget_gb), device)
        self._models: dict[str, _Loaded] = {}
        self._asked_last = ""
        self._coding: tuple[Item[CompressionModel], weakref.ref[Codec]] | None = None
        self._diffusion: tuple[Item[list[Band]], MultiBandDiffusion, Codec] | None = None
        self._opener = Opener(weights, settings.lora_strength)
        self._fitting: set[tuple[FileState, str]] = set()

    def start(self) -> Model:
        """Loads somebody's own `finetuned`, else the first base model that is present, else the demo model.

        Raises:
            WeightsError: there is none of them, or it does not load or is larger than the budget.
        """
        own = self._weights.finetuned and not self._weights.is_demo
        base = self._weights.base_models()
        return self.model(FINETUNED if own or not base else base[0])

    def model(self, name: str) -> Model:
        """The model called `name`, in place of others if need be.

        Raises:
            WeightsError: it is absent, does not load, or is larger than the budget.
        """
        loaded = self._current(name)
        if loaded is None:
            with self._opener.trying(name) as opened:
                loaded = self._models[name] = self._load(name, opened)
        self._asked_last = name
        self._store.use(*loaded.items)
        return loaded.model.value()

    def takes_melody(self, name: str) -> bool:
        """Whether the model follows a melody, without loading it."""
        if loaded := self._current(name):
            return loaded.model.value().conditioner.takes_melody
        return MELODY in self._opener.read(name, lambda opened: conditioner_names(opened.config()))

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
        with self._opener.trying(next(iter(self._weights.base_models()), FINETUNED)) as opened:
            config = opened.config()
            codec = self._store.find(components.codec(self._weights, opened, config, self.device))
            # It has no model of its own, and whether the one that was asked for last still runs is not known.
            self._make_room(f"The codec of {opened.path.name}", [codec], last=self._in_use())
            given = Codec(wrap_codec(self._store.get(codec), config))
        self._coding = codec, weakref.ref(given)
        return opened.path, given

    def diffusion(self, place: Path, codec: Codec) -> MultiBandDiffusion:
        """MultiBand Diffusion for the codec of the checkpoint at `place`.

        Raises:
            InputError, WeightsError: as `diffusion_weights`.
        """
        bands = self.diffusion_weights(place, codec)
        if self._diffusion and self._diffusion[0] is bands and self._diffusion[2] is codec:
            self._store.use(bands)
            return self._diffusion[1]
        keep, last = self._beside_diffusion(codec)
        self._make_room(WITH_DIFFUSION, [bands], keep=keep, last=last)
        decoder = MultiBandDiffusion(self._store.get(bands), codec, self._settings.diffusion_window_s)
        self._diffusion = bands, decoder, codec
        return decoder

    def diffusion_weights(self, place: Path, codec: Codec) -> Item[list[Band]]:
        """What `diffusion` loads, which need not be in memory: asked for before the work that it decodes.

        Raises:
            InputError: the diffusion weights belong to another codec, or are larger than what the budget
                leaves beside the model.
            WeightsError: there are none.
        """
        folder = self._weights.component(DIFFUSION, place)
        file = folder / DIFFUSION_FILE
        bands = self._store.find(components.diffusion(file, self.device))
        if folder.parent != place and not self._fits(file, codec):
            raise InputError(
                f"multi_band_diffusion is true, but {place.name} has a codec of its own and the "
                "diffusion decoder fits only the one that it was trained for: set it to false."
            )
        try:
            self._check_room(WITH_DIFFUSION, [bands], self._beside_diffusion(codec)[0])
        except WeightsError as exc:
            raise InputError(f"multi_band_diffusion is true, but {exc}") from exc
        return bands

    def _beside_diffusion(self, codec: Codec) -> tuple[Sequence[Item[Any]], Sequence[Item[Any]]]:
        """What must stay while it decodes, and what goes last."""
        model = self._resident(self._asked_last)
        if model is not None and model.model.value().codec is codec:
            return model.items, ()
        return ([self._coding[0]] if self._coding and self._coding[1]() is codec else []), self._in_use()

    def _in_use(self) -> Sequence[Item[Any]]:
        """The model that was asked for last, and its parts."""
        loaded = self._resident(self._asked_last)
        return loaded.items if loaded else ()

    def _make_room(
        self, what: str, items: Sequence[Item[Any]], *,
        keep: Sequence[Item[Any]] = (), last: Sequence[Item[Any]] = (),
    ) -> None:  # fmt: skip
        """Makes room for what is not resident of the items, before any of it is built.

        Args:
            what: all of them, for the message.
            keep: what is in use.
            last: what only goes if nothing else is left.

        Raises:
            WeightsError: they do not fit beside what is in use; nothing has been let go.
        """
        if all(item.resident for item in items):
            return
        self._check_room(what, items, keep)
        self._diffusion = None  # it would keep a codec and its own models from going
        self._store.make_room(items, keep, last)

    def _check_room(self, what: str, items: Sequence[Item[Any]], keep: Sequence[Item[Any]]) -> None:
        """Raises what `_make_room` would."""
        try:
            self._store.check_room(items, keep)
        except DoesNotFit as exc:
            sentence = (
                f"{what} takes {exc.need / GB:.3g} GB of memory, and the budget is {exc.budget / GB:.3g} GB: "
                "take a smaller model, or raise MUSICGEN_MEMORY_BUDGET_GB."
            )
            raise WeightsError(sentence, for_client=sentence) from exc

    def _resident(self, name: str) -> _Loaded | None:
        loaded = self._models.get(name)
        return loaded if loaded and loaded.model.resident else None

    def _current(self, name: str) -> _Loaded | None:
        """The model if it is resident and nobody has put other files in the place of its own."""
        loaded = self._resident(name)
        return loaded if loaded and loaded.stands else None

    def _load(self, name: str, opened: OpenedCheckpoint) -> _Loaded:
        config = opened.config()
        melody = MELODY in conditioner_names(config)
        codec_recipe = components.codec(self._weights, opened, config, self.device)
        text_recipe = components.text(self._weights, opened, config, self.device)
        codec, text = self._store.find(codec_recipe), self._store.find(text_recipe)
        lm = draft_lm(config, f"The {opened.format} {opened.path}", self.device)
        slots, precision = self._settings.slots, self._settings.precision
        given = self._weights.model(name)  # perhaps an archive, whose files lie elsewhere
        made_of = (*opened.files, given, *codec_recipe.files, *text_recipe.files)
        files = tuple(FileState.of(file) for file in made_of if file.is_file())
        size = lm.size + engine_bytes(config, self.device, slots=slots, precision=precision)

        def assembled() -> Model:
            return self._assembled(name, opened, lm, Codec(wrap_codec(codec.value(), config)), text.value())

        model = self._store.find(Recipe("model", (), lambda: Draft(size, assembled)))
        needed: list[Item[Any]] = [model, codec, text]
        if melody:  # built when it is first heard: there must be room for it, too
            needed.append(self._store.find(self._separator(opened.path, config.get("sample_rate"))))
        beside = "its codec, T5 and Demucs" if melody else "its codec and T5"
        self._make_room(f"model_version {name!r} with {beside}", needed)
        self._store.get(codec)
        self._store.get(text)
        self._store.get(model)
        return _Loaded(model, (codec, text), files)

    def _assembled(
        self, name: str, opened: OpenedCheckpoint, draft: LMDraft, codec: Codec, text: Text
    ) -> Model:
        config = draft.config
        check_codec(f"The {opened.format} {opened.path}", config, codec)
        width = config.transformer_lm.dim
        described = TextConditioner(text.encoder, text.tokenizer, text.encoder.d_model, width)
        followed = None
        if MELODY in conditioner_names(config):
            separate = self._separate_with(opened.path, codec.sample_rate)
            followed = build_melody_conditioner(config, separate, codec.sample_rate, self.device)
        conditioner = Conditioner(described, followed)
        lm = draft.begin(opened.lm(), conditioner)
        return Model(
            name=name,
            place=opened.path,
            format=opened.format,
            window_s=float(config.dataset.segment_duration),
            conditioner=conditioner,
            engine=Engine(
                batch_for(
                    lm,
                    slots=self._settings.slots,
                    precision=cast(Precision, self._settings.precision),
                    graphs=cast(Switch, self._settings.cuda_graphs),
                    kernels=cast(Switch, self._settings.gpu_kernels),
                    load_weights=draft.lend,
                ),
                self._device_queue,
            ),
            codec=codec,
            hash=self._store.hashes.content_later(opened.files),
        )

    def _separator(self, checkpoint: Path, sample_rate: int) -> Recipe[Separator]:
        """Demucs; there and not yet built, or missing."""
        return components.separator(self._weights.component(DEMUCS, checkpoint), sample_rate, self.device)

    def _separate_with(self, checkpoint: Path, sample_rate: int) -> Separate:
        """Demucs, loaded when a melody is first heard, or heard again after it was let go."""

        def separate(audio: torch.Tensor, tick: Tick = no_tick) -> torch.Tensor:
            separator = self._store.find(self._separator(checkpoint, sample_rate))
            self._make_room("Demucs beside the model", [separator], keep=self._in_use())
            return self._store.get(separator)(audio, tick)

        return separate

    def _fits(self, diffusion: Path, codec: Codec) -> bool:
        """Whether a codec is one of those beside the diffusion weights, which were trained for them."""
        pair = FileState.of(diffusion), codec.fingerprint()
        if pair not in self._fitting and pair[1] in components.fingerprints(
            self._weights, diffusion.parent.parent, self._opener.open_path
        ):
            self._fitting.add(pair)
        return pair in self._fitting
