"""The parts that a language model needs: where their files are, how large they are and how they are built.

Models whose parts have files of equal content share one part in memory. Each part therefore has a `Spec`.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from musicgen_svc.audiocraft_compat import CompressionModel
from musicgen_svc.checkpoints import Checkpoint, CodecPointer, OpenedCheckpoint, TransformersPart
from musicgen_svc.checkpoints.base import part_name
from musicgen_svc.checkpoints.damage import name_exists
from musicgen_svc.checkpoints.tensor_files import read_tensors
from musicgen_svc.checkpoints.transformers_part import read_transformers_part
from musicgen_svc.checkpoints.unpickle import load_pickle
from musicgen_svc.errors import WeightsError
from musicgen_svc.loading.cache import Spec
from musicgen_svc.loading.file_hashes import states_of
from musicgen_svc.models.conditioners import MELODY, TEXT, conditioner_names
from musicgen_svc.models.demucs import Separator, load_separator, read_bag
from musicgen_svc.models.diffusion_bands import Band, build_bands
from musicgen_svc.models.encodec import Codec
from musicgen_svc.models.encodec_builder import build_codec, read_encodec
from musicgen_svc.models.t5 import T5Encoder, load_t5
from musicgen_svc.models.t5_tokenizer import (
    BESIDE_TOKENIZER,
    TOKENIZER_FILES,
    PromptTokenizer,
    load_tokenizer,
)
from musicgen_svc.weights.paths import Weights

DEMUCS = "htdemucs"
ENCODEC = "encodec_32khz"


@dataclass(frozen=True)
class Text:
    """T5 and its tokenizer."""

    encoder: T5Encoder
    tokenizer: PromptTokenizer


@dataclass(frozen=True)
class Specs:
    """The specs of all parts of one model."""

    codec: Spec[CompressionModel]
    text: Spec[Text]
    separator: Spec[Separator] | None
    """None for a model that takes no melody."""


def specs_of(weights: Weights, opened: OpenedCheckpoint, config: DictConfig, device: torch.device) -> Specs:
    """Returns the specs of all parts that a checkpoint needs.

    Args:
        weights: where the parts are that the checkpoint does not contain.
        opened: the checkpoint.
        config: its configuration.
        device: where the parts will run.

    Raises:
        WeightsError: the checkpoint has conditioners that MusicGen does not have, or a part is missing or
            damaged.
    """
    takes_melody = MELODY in conditioner_names(config)
    codec = codec_spec(weights, opened, config, device)
    text = text_spec(weights, opened, config, device)
    if not takes_melody:
        return Specs(codec, text, None)
    folder = weights.part_path(DEMUCS, opened.path)
    return Specs(codec, text, separator_spec(folder, config.get("sample_rate"), device))


def codec_spec(
    weights: Weights, opened: OpenedCheckpoint, config: DictConfig, device: torch.device
) -> Spec[CompressionModel]:
    """Returns the spec of the checkpoint's codec.

    Raises:
        WeightsError: the codec is missing, or its files are damaged.
    """
    source = codec_source(weights, opened)
    return Spec(
        "codec",
        states_of(source.files),
        size=lambda: _fp32_bytes(source.state.values()),
        build=lambda: build_codec(source, device),
        # The number of codebooks is set on the codec itself: models with different numbers cannot share it.
        variant=config.get("compression_model_n_q"),
    )


def codec_source(weights: Weights, opened: OpenedCheckpoint) -> Checkpoint | TransformersPart:
    """Returns the configuration and tensors of the codec in the checkpoint, or of the codec that it names.

    Raises:
        WeightsError: the codec is missing, or its files are damaged.
    """
    found = opened.codec()
    if isinstance(found, CodecPointer):
        return read_encodec(weights.part_path(found.name, opened.path))
    return found


def codec_fingerprints(
    weights: Weights, folder: Path, open_path: Callable[[Path], OpenedCheckpoint]
) -> Iterator[str]:
    """Yields the fingerprints of the base models' codecs in a folder of weights."""
    cpu = torch.device("cpu")
    for model in [folder / name for name in weights.catalog.models]:
        if model.is_dir():
            yield Codec(build_codec(codec_source(weights, open_path(model)), cpu)).fingerprint()
    if (folder / ENCODEC).is_dir():
        yield Codec(build_codec(read_encodec(folder / ENCODEC), cpu)).fingerprint()


def text_spec(
    weights: Weights, opened: OpenedCheckpoint, config: DictConfig, device: torch.device
) -> Spec[Text]:
    """Returns the spec of T5: the checkpoint's own if it has one, else the one that its configuration names.

    Raises:
        WeightsError: T5 is missing or damaged, or the checkpoint needs its prompts normalized.
    """
    wanted = config.conditioners[TEXT].t5
    if wanted.get("normalize_text"):
        raise WeightsError("The checkpoint normalizes its prompts (normalize_text), which needs spaCy.")
    inside = opened.text_encoder()
    if inside is not None and any(name_exists(opened.path / name) for name in TOKENIZER_FILES):
        folder = opened.path
    else:
        folder = weights.part_path(part_name(wanted.name), opened.path)
    source = read_transformers_part(folder) if inside is None else inside
    tokenizer_files = [folder / name for name in (*TOKENIZER_FILES, *BESIDE_TOKENIZER)]

    def build() -> Text:
        t5 = load_t5(source, device)
        return Text(t5, load_tokenizer(folder, t5.vocab_size))

    return Spec(
        "text",
        states_of((*source.files, *(path for path in tokenizer_files if name_exists(path)))),
        size=lambda: _fp32_bytes(_t5_encoder_tensors(source.state)),
        build=build,
    )


def _t5_encoder_tensors(state: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Returns the tensors that T5's encoder needs: the embedding, which may have two names, only once."""
    encoder = [t for name, t in state.items() if name.startswith("encoder.") and ".embed_tokens." not in name]
    embedding = [t for name, t in state.items() if name in ("shared.weight", "encoder.embed_tokens.weight")]
    return [*encoder, *embedding[:1]]


def separator_spec(folder: Path, sample_rate: int, device: torch.device) -> Spec[Separator]:
    """Returns the spec of Demucs for melodies at `sample_rate` Hz.

    Raises:
        WeightsError: its files are missing or damaged, or its list of models names files elsewhere.
    """
    models = tuple(folder / f"{name}.safetensors" for name in sorted(set(read_bag(folder)["models"])))
    return Spec(
        "separator",
        states_of((*sorted(folder.glob("*.yaml")), *models)),
        size=lambda: sum(_fp32_bytes(read_tensors((model,)).values()) for model in models),
        build=lambda: load_separator(folder, sample_rate, device),
        variant=sample_rate,
    )


def diffusion_spec(file: Path, device: torch.device) -> Spec[list[Band]]:
    """Returns the spec of the models of MultiBand Diffusion in audiocraft's file.

    Raises:
        WeightsError: the file is missing or damaged.
    """
    package = cache(lambda: load_pickle(file))  # opened once, and only if the models are not in memory
    return Spec(
        "diffusion",
        states_of([file]),
        size=lambda: _fp32_bytes(_tensors_in(package())),
        build=lambda: build_bands(package(), file, device),
    )


def _fp32_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors in fp32, whatever type they are stored in."""
    return 4 * sum(tensor.numel() for tensor in tensors)


def _tensors_in(package: Any) -> Iterator[torch.Tensor]:
    """Yields the tensors in nested dictionaries. Visits each dictionary once: it may contain itself."""
    waiting, seen = [package], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values()
