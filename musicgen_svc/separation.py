"""Demucs: audio -> the stems that carry its melody."""

import json
import re
import threading
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open

from musicgen_svc.damage import check_not_damaged, damaged
from musicgen_svc.errors import WeightsError, first_line
from musicgen_svc.ticks import Tick, no_tick

MELODIC_STEMS = ("vocals", "other")
_ARCHITECTURES = ("demucs.htdemucs.HTDemucs", "demucs.hdemucs.HDemucs", "demucs.demucs.Demucs")
_BAG = "htdemucs"
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")

REACH_S = 10.0
"""How far behind a place what is heard may change the stems there: a segment of HTDemucs, 7.8 s, and what it
is shifted by at random, 0.5 s."""


class Separator:
    """Keeps vocals and accompaniment, leaves out drums and bass: what audiocraft calls the melody."""

    def __init__(self, bag: Any, sample_rate: int) -> None:
        self._bag = bag
        self._sample_rate = sample_rate
        self._stems = [bag.sources.index(stem) for stem in MELODIC_STEMS]
        # Those that normalize scale what they make by the deviation of what they hear: none, in silence.
        self._leaves_silence = all(getattr(model, "normalize", True) for model in bag.models)
        # Of a thread: at a tick another request may have its turn, and come here, too.
        self._running = threading.local()
        for part in (part for model in bag.models for part in model.modules()):
            if next(part.children(), None) is None:
                part.register_forward_hook(self._report)

    @torch.inference_mode()
    def __call__(self, audio: torch.Tensor, tick: Tick = no_tick) -> torch.Tensor:
        """[B, 1, T] -> [B, 1, T], at the separator's rate. Draws one time shift a model from `random`."""
        sounds = audio.flatten(1).any(dim=1)  # [B]
        if not self._leaves_silence or not sounds.any():  # it draws in any case
            return self._separated(audio, tick)
        stems = self._separated(audio[sounds], tick)
        melody = stems.new_zeros(len(audio), *stems.shape[1:])
        melody[sounds] = stems
        return melody

    def _separated(self, audio: torch.Tensor, tick: Tick) -> torch.Tensor:
        from demucs.apply import apply_model
        from demucs.audio import convert_audio

        mix = convert_audio(audio, self._sample_rate, self._bag.samplerate, self._bag.audio_channels)
        length = mix.shape[-1]
        reached = 0

        def note(event: dict[str, Any]) -> None:
            nonlocal reached
            reached = event["segment_offset"]

        self._running.tick = lambda: tick(reached, length)
        try:
            stems = apply_model(self._bag, mix, device=mix.device, callback=note)
        finally:
            del self._running.tick
        melody = stems[:, self._stems].sum(1)
        mono: torch.Tensor = convert_audio(melody, self._bag.samplerate, self._sample_rate, 1)
        return mono

    def _report(self, *_: Any) -> None:
        """After each layer: a segment takes seconds on a CPU."""
        getattr(self._running, "tick", lambda: None)()


def load_separator(folder: Path, sample_rate: int, device: torch.device) -> Separator:
    """Demucs from the files of its Hugging Face repository.

    Raises:
        WeightsError: files are missing, unreadable, or name something that is no Demucs.
    """
    from demucs.apply import BagOfModels

    bag = read_bag(folder)
    models = [_load_model(folder / f"{signature}.safetensors") for signature in bag["models"]]
    bag_of_models = BagOfModels(models, bag.get("weights"), bag.get("segment"))
    missing = set(MELODIC_STEMS) - set(bag_of_models.sources)
    if missing:
        raise WeightsError(f"The Demucs model in {folder} has no stem called {' or '.join(sorted(missing))}.")
    return Separator(bag_of_models.to(device).eval(), sample_rate)


def read_bag(folder: Path) -> dict[str, Any]:
    """The file that names the models of a Demucs, whose names are those of files beside it.

    Raises:
        WeightsError: it is missing or damaged, or names no models, or files elsewhere.
    """
    path = folder / f"{_BAG}.yaml"
    check_not_damaged(path)
    try:
        bag = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as exc:
        raise damaged(path, "YAML") from exc
    names = bag.get("models") if isinstance(bag, dict) else None
    if not isinstance(names, list) or not names:
        raise damaged(path, "a list of Demucs models")
    for name in names:
        if not _NAME.fullmatch(str(name)):
            raise WeightsError(
                f"{path} names the model {name!r:.80}; it must be the plain name of a file beside it."
            )
    return dict(bag)


def _load_model(path: Path) -> Any:
    """One model. Its metadata names a class to build: only Demucs' own are built.

    Raises:
        WeightsError: the file is missing or damaged, or holds something else.
    """
    from demucs.hf import load_safetensors_model

    check_not_damaged(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        if metadata.get("klass") not in _ARCHITECTURES:
            raise WeightsError(
                f"{path} is a model of the class {metadata.get('klass')!r:.80}, which is no Demucs."
            )
        if "_class" in json.dumps(json.loads(metadata.get("structure", "null"))):
            raise WeightsError(f"{path} names classes in its structure, which no Demucs does.")
        return load_safetensors_model(path)
    except SafetensorError as exc:
        raise damaged(path, "safetensors") from exc
    except (OSError, KeyError, TypeError, ValueError, RuntimeError) as exc:
        raise WeightsError(f"{path} does not hold a Demucs model: {first_line(exc)}") from exc
