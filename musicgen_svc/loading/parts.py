"""The parts that a language model needs: where their files are, how large they are and how they are built.

Models whose parts have files of equal content share one part in memory. Therefore each part has a `PartKey`.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from musicgen_svc.audiocraft_compat import CompressionModel
from musicgen_svc.checkpoints import Checkpoint, CodecPointer, OpenedCheckpoint, TransformersPart
from musicgen_svc.checkpoints.base import component_name
from musicgen_svc.checkpoints.damage import is_there
from musicgen_svc.checkpoints.tensor_files import read_tensors
from musicgen_svc.checkpoints.transformers_part import read_transformers_part
from musicgen_svc.checkpoints.unpickle import load_pickle
from musicgen_svc.errors import WeightsError
from musicgen_svc.loading.cache import PartKey, Spec
from musicgen_svc.models.conditioners import TEXT
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

ENCODEC = "encodec_32khz"


@dataclass(frozen=True)
class Text:
    """T5 and its tokenizer."""

    encoder: T5Encoder
    tokenizer: PromptTokenizer


def codec_key(
    weights: Weights, opened: OpenedCheckpoint, config: DictConfig, device: torch.device
) -> PartKey[CompressionModel]:
    """Returns the key of the checkpoint's codec.

    Raises:
        WeightsError: the codec is missing, or its files are damaged.
    """
    source = codec_source(weights, opened)

    def read_spec() -> Spec[CompressionModel]:
        return Spec(_fp32_bytes(source.state.values()), lambda: build_codec(source, device))

    # The number of codebooks is set on the codec itself: models with different numbers cannot share a codec.
    return PartKey("codec", source.files, read_spec, variant=config.get("compression_model_n_q"))


def codec_source(weights: Weights, opened: OpenedCheckpoint) -> Checkpoint | TransformersPart:
    """Returns the configuration and tensors of the codec in the checkpoint, or of the codec that it names.

    Raises:
        WeightsError: the codec is missing, or its files are damaged.
    """
    found = opened.codec()
    if isinstance(found, CodecPointer):
        return read_encodec(weights.component(found.name, opened.path))
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


def text_key(
    weights: Weights, opened: OpenedCheckpoint, config: DictConfig, device: torch.device
) -> PartKey[Text]:
    """Returns the key of T5: the checkpoint's own if it has one, else the one that its configuration names.

    Raises:
        WeightsError: T5 is missing or damaged, or the checkpoint needs its prompts normalized.
    """
    wanted = config.conditioners[TEXT].t5
    if wanted.get("normalize_text"):
        raise WeightsError("The checkpoint normalizes its prompts (normalize_text), which needs spaCy.")
    inside = opened.text_encoder()
    if inside is not None and any(is_there(opened.path / name) for name in TOKENIZER_FILES):
        folder = opened.path
    else:
        folder = weights.component(component_name(wanted.name), opened.path)
    source = read_transformers_part(folder) if inside is None else inside
    tokenizer_files = [folder / name for name in (*TOKENIZER_FILES, *BESIDE_TOKENIZER)]

    def build() -> Text:
        t5 = load_t5(source, device)
        return Text(t5, load_tokenizer(folder, t5.vocab_size))

    return PartKey(
        role="text",
        files=(*source.files, *(path for path in tokenizer_files if is_there(path))),
        read_spec=lambda: Spec(_fp32_bytes(_t5_encoder_tensors(source.state)), build),
    )


def _t5_encoder_tensors(state: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Returns the tensors that T5's encoder needs: the embedding, which may have two names, only once."""
    encoder = [t for name, t in state.items() if name.startswith("encoder.") and ".embed_tokens." not in name]
    embedding = [t for name, t in state.items() if name in ("shared.weight", "encoder.embed_tokens.weight")]
    return [*encoder, *embedding[:1]]


def separator_key(folder: Path, sample_rate: int, device: torch.device) -> PartKey[Separator]:
    """Returns the key of Demucs for melodies at `sample_rate` Hz.

    Raises:
        WeightsError: its list of models is missing or damaged, or names files elsewhere.
    """
    models = tuple(folder / f"{name}.safetensors" for name in sorted(set(read_bag(folder)["models"])))

    def read_spec() -> Spec[Separator]:
        size = sum(_fp32_bytes(read_tensors((model,)).values()) for model in models)
        return Spec(size, lambda: load_separator(folder, sample_rate, device))

    return PartKey("separator", (*sorted(folder.glob("*.yaml")), *models), read_spec, variant=sample_rate)


def diffusion_key(file: Path, device: torch.device) -> PartKey[list[Band]]:
    """Returns the key of the models of MultiBand Diffusion in audiocraft's file."""

    def read_spec() -> Spec[list[Band]]:
        package = load_pickle(file)
        return Spec(_fp32_bytes(_tensors_in(package)), lambda: build_bands(package, file, device))

    return PartKey("diffusion", (file,), read_spec)


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
