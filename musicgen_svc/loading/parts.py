"""What a language model needs beside it: where each part lies, what it takes and how it is built.

A part is what its files say, wherever they lie: models with equal files share one.
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
from musicgen_svc.checkpoints.damage import name_exists
from musicgen_svc.checkpoints.tensor_files import TRANSFORMERS_FILES, read_tensors, tensor_files
from musicgen_svc.checkpoints.unpickle import load_pickle
from musicgen_svc.errors import WeightsError
from musicgen_svc.loading.cache import Draft, Recipe
from musicgen_svc.models.building import build_codec, build_transformers_codec, codec_in
from musicgen_svc.models.conditioners import TEXT
from musicgen_svc.models.demucs import Separator, load_separator, read_bag
from musicgen_svc.models.diffusion_bands import Band, load_bands
from musicgen_svc.models.encodec import Codec
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


def codec(
    weights: Weights, opened: OpenedCheckpoint, config: DictConfig, device: torch.device
) -> Recipe[CompressionModel]:
    """The checkpoint's codec: its own, or the one that it points to."""
    source = codec_source(weights, opened)
    return Recipe(
        kind="codec",
        files=source.files,
        draft=lambda: Draft(_fp32_bytes(source.state.values()), lambda: built_codec(source, device)),
        variant=config.get("compression_model_n_q"),  # which is set on the codec itself
    )


def codec_source(weights: Weights, opened: OpenedCheckpoint) -> Checkpoint | TransformersPart:
    """What the checkpoint's codec is built from."""
    found = opened.codec()
    return codec_in(weights.component(found.name, opened.path)) if isinstance(found, CodecPointer) else found


def built_codec(source: Checkpoint | TransformersPart, device: torch.device) -> CompressionModel:
    """
    Raises:
        WeightsError: it is no EnCodec, or its tensors are another one's.
    """
    if isinstance(source, Checkpoint):
        return build_codec(source, device)
    return build_transformers_codec(source, device)


def fingerprints(
    weights: Weights, folder: Path, open_path: Callable[[Path], OpenedCheckpoint]
) -> Iterator[str]:
    """The codecs that lie in a folder of weights, one after the other."""
    cpu = torch.device("cpu")
    for model in [folder / name for name in weights.catalog.models]:
        if model.is_dir():
            source = codec_source(weights, open_path(model))
            yield Codec(built_codec(source, cpu)).fingerprint()
    if (folder / ENCODEC).is_dir():
        yield Codec(build_transformers_codec(codec_in(folder / ENCODEC), cpu)).fingerprint()


def text(
    weights: Weights, opened: OpenedCheckpoint, config: DictConfig, device: torch.device
) -> Recipe[Text]:
    """T5 from inside the checkpoint, if it brings one, else by the name in its configuration.

    Raises:
        WeightsError: there is none, or the checkpoint wants its prompts changed first.
    """
    wanted = config.conditioners[TEXT].t5
    if wanted.get("normalize_text"):
        raise WeightsError("The checkpoint normalizes its prompts (normalize_text), which needs spaCy.")
    inside = opened.text_encoder()
    if inside is not None and any(name_exists(opened.path / name) for name in TOKENIZER_FILES):
        folder = opened.path
    else:
        folder = weights.component(component_name(wanted.name), opened.path)
    if inside is None:
        weight_files = tensor_files(folder, TRANSFORMERS_FILES)
        files, state = (folder / "config.json", *weight_files), read_tensors(weight_files)
    else:
        files, state = inside.files, inside.state
    tokenizer_files = [folder / name for name in (*TOKENIZER_FILES, *BESIDE_TOKENIZER)]
    encoder = [t for name, t in state.items() if name.startswith("encoder.") and ".embed_tokens." not in name]
    embedding = [t for name, t in state.items() if name in ("shared.weight", "encoder.embed_tokens.weight")]

    def built() -> Text:
        t5 = load_t5(inside or folder, device)
        return Text(t5, load_tokenizer(folder, t5.vocab_size))

    return Recipe(
        kind="text",
        files=(*files, *(path for path in tokenizer_files if name_exists(path))),
        draft=lambda: Draft(_fp32_bytes([*encoder, *embedding[:1]]), built),
    )


def separator(folder: Path, sample_rate: int, device: torch.device) -> Recipe[Separator]:
    """Demucs.

    Raises:
        WeightsError: its list of models is missing or damaged, or names files elsewhere.
    """
    models = tuple(folder / f"{name}.safetensors" for name in sorted(set(read_bag(folder)["models"])))
    return Recipe(
        kind="separator",
        files=(*sorted(folder.glob("*.yaml")), *models),
        draft=lambda: Draft(
            sum(_fp32_bytes(read_tensors((model,)).values()) for model in models),
            lambda: load_separator(folder, sample_rate, device),
        ),
        variant=sample_rate,
    )


def diffusion(file: Path, device: torch.device) -> Recipe[list[Band]]:
    """The models of MultiBand Diffusion."""
    return Recipe(
        kind="diffusion",
        files=(file,),
        draft=lambda: Draft(_fp32_bytes(_tensors_in(load_pickle(file))), lambda: load_bands(file, device)),
    )


def _fp32_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return 4 * sum(tensor.numel() for tensor in tensors)


def _tensors_in(package: Any) -> Iterator[torch.Tensor]:
    """Those in nested dictionaries, each dictionary once: a pickled one may hold itself."""
    waiting, seen = [package], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values()
