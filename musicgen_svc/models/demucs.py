"""Demucs (Rouard et al. 2022, arXiv:2211.08553): loads it, and separates the stems that carry a melody."""

import importlib
import inspect
import json
import math
import re
import threading
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from musicgen_svc.checkpoints.damage import check_not_damaged, damaged_error
from musicgen_svc.checkpoints.expansion import MAX_YAML_CHARACTERS
from musicgen_svc.checkpoints.part_configs import check_demucs, demucs_bag
from musicgen_svc.checkpoints.tensor_checks import check_finite
from musicgen_svc.errors import WeightsError, first_line
from musicgen_svc.models.meta_init import on_meta
from musicgen_svc.runtime.ticks import Tick, no_tick

MELODIC_STEMS = ("vocals", "other")
_ARCHITECTURES = ("demucs.htdemucs.HTDemucs", "demucs.hdemucs.HDemucs", "demucs.demucs.Demucs")
_BAG = "htdemucs"
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")

REACH_S = 10.0
"""How far ahead in the input a sample of the stems may depend on it: a segment of HTDemucs, 7.8 s, and its
random shift, 0.5 s, rounded up."""


class Separator:
    """Keeps vocals and accompaniment, from which audiocraft takes the melody, and removes drums and bass."""

    def __init__(self, bag: Any, sample_rate: int) -> None:
        """Makes a separator.

        Args:
            bag: Demucs' `BagOfModels`.
            sample_rate: of input and output, in Hz.
        """
        self._bag = bag
        self._sample_rate = sample_rate
        self._stems = [bag.sources.index(stem) for stem in MELODIC_STEMS]
        # A model that normalizes scales its output by the deviation of its input, which is 0 for silence.
        self._leaves_silence = all(getattr(model, "normalize", True) for model in bag.models)
        # Per thread, because a tick may yield the device to another request, which may use the separator too.
        self._running = threading.local()
        for part in (part for model in bag.models for part in model.modules()):
            if next(part.children(), None) is None:
                part.register_forward_hook(self._report)

    @torch.inference_mode()
    def __call__(self, audio: torch.Tensor, tick: Tick = no_tick) -> torch.Tensor:
        """Separates the melodic stems: [B, 1, T] -> [B, 1, T], both at the separator's sample rate.

        Draws one time shift per model from Python's `random`. Rows of silence are not computed if the result
        must be silence.
        """
        audible = audio.flatten(1).any(dim=1)  # [B]
        # Silence alone is computed too, so that the same shifts are drawn in any case.
        if not self._leaves_silence or not audible.any():
            return self._separated(audio, tick)
        stems = self._separated(audio[audible], tick)
        melody = stems.new_zeros(len(audio), *stems.shape[1:])
        melody[audible] = stems
        return melody

    def _separated(self, audio: torch.Tensor, tick: Tick) -> torch.Tensor:
        """Runs Demucs on all rows: [B, 1, T] -> [B, 1, T]."""
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
        """Calls this thread's tick. A hook after each layer, because a segment takes seconds on a CPU."""
        getattr(self._running, "tick", lambda: None)()


def load_separator(folder: Path, sample_rate: int, device: torch.device) -> Separator:
    """Loads Demucs from the files of its Hugging Face repository.

    Args:
        folder: of the files.
        sample_rate: of the separator's input and output, in Hz.
        device: where the weights go.

    Raises:
        WeightsError: a file is missing, damaged or too large, or is not a Demucs.
    """
    from demucs.apply import BagOfModels

    bag = read_bag(folder)
    models = [_load_model(folder / f"{signature}.safetensors") for signature in bag["models"]]
    try:
        bag_of_models = BagOfModels(models, bag.get("weights"), bag.get("segment"))
    except Exception as exc:  # Demucs' constructors raise errors of any class
        raise WeightsError(f"{folder} does not hold a Demucs model: {first_line(exc)}") from exc
    missing = set(MELODIC_STEMS) - set(bag_of_models.sources)
    if missing:
        raise WeightsError(f"The Demucs model in {folder} has no stem called {' or '.join(sorted(missing))}.")
    return Separator(bag_of_models.to(device).eval(), sample_rate)


def read_bag(folder: Path) -> dict[str, Any]:
    """Reads the YAML file that names the models of a Demucs, each of which is a file in the same folder.

    Raises:
        WeightsError: the file is missing or damaged, names no model, or names a file elsewhere.
    """
    path = folder / f"{_BAG}.yaml"
    check_not_damaged(path)
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_YAML_CHARACTERS + 1)
    except (OSError, ValueError) as exc:
        raise damaged_error(path, "YAML") from exc
    bag = demucs_bag(text, str(path))
    for name in bag["models"]:
        if not _NAME.fullmatch(str(name)):
            raise WeightsError(
                f"{path} names the model {name!r:.80}; it must be the plain name of a file beside it."
            )
    return bag


def _load_model(path: Path) -> Any:
    """Loads one model. The file's metadata names its class; only Demucs' own classes are accepted.

    Raises:
        WeightsError: the file is missing or damaged, or does not hold a Demucs model.
    """
    check_not_damaged(path)
    try:
        return _built(path)
    except SafetensorError as exc:
        raise damaged_error(path, "safetensors") from exc
    except WeightsError:
        raise
    except Exception as exc:  # Demucs' constructors raise errors of any class
        raise WeightsError(f"{path} does not hold a Demucs model: {first_line(exc)}") from exc


def _built(path: Path) -> Any:
    """Checks the metadata of a safetensors file, then builds the model that it describes.

    Raises:
        WeightsError: the metadata names another class, or a field is out of its bounds.
        ValueError: the file holds less than the model needs, or a kind of numbers that is not supported.
        SafetensorError: the file is damaged.
    """
    from demucs.hf import _decode_json, load_safetensors_model

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118
        numbers = sum(math.prod(tensor.get_shape()) for tensor in tensors)
        if any(tensor.get_dtype().startswith("C") for tensor in tensors):
            raise ValueError("it holds complex numbers")
    if metadata.get("klass") not in _ARCHITECTURES:
        raise WeightsError(
            f"{path} is a model of the class {metadata.get('klass')!r:.80}, which is no Demucs."
        )
    structure = json.dumps(json.loads(metadata.get("structure", "null")))
    if "_class" in structure:
        raise WeightsError(f"{path} names classes in its structure, which no Demucs does.")
    if "__quantized" in structure:
        raise ValueError("it is quantized, which needs diffq")
    module, name = metadata["klass"].rsplit(".", 1)
    klass = getattr(importlib.import_module(module), name)
    args, kwargs = (_decode_json(json.loads(metadata[part])) for part in ("args", "kwargs"))
    signature = inspect.signature(klass)
    arguments = signature.bind(*args, **kwargs).arguments
    check_demucs(arguments, str(path))
    # These options change initial weights, which a model on the meta device does not have.
    weightless = {"rescale": 0, "emb_smooth": False}
    with on_meta():
        empty = klass(
            **arguments | {name: weightless[name] for name in weightless.keys() & signature.parameters}
        )
    needed = sum(tensor.numel() for tensor in empty.state_dict().values())
    if needed > numbers:
        raise ValueError(f"it holds {numbers} numbers, and its configuration needs {needed}")
    model = load_safetensors_model(path)
    check_finite(model.state_dict().items(), str(path))
    return model
