"""Every format in the README's table is loaded as `finetuned` and generates."""

import json
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from test_transformers_folder import model_of

from musicgen_svc.engine.sampling_params import SamplingParams
from musicgen_svc.errors import WeightsError
from musicgen_svc.generation import generate, prepare
from musicgen_svc.loading.loader import Loader
from musicgen_svc.runtime.randomness import GlobalRandom
from musicgen_svc.settings import Settings
from musicgen_svc.weights.catalog import read_catalog
from musicgen_svc.weights.paths import Weights

CPU = torch.device("cpu")
Make = Callable[[Path, Path], Path]


def package(weights: Path) -> dict[str, Any]:
    """A language model whose codec is encodec_32khz, as formats without a codec take it for granted."""
    return dict(torch.load(weights / "hf-codec" / "state_dict.bin", weights_only=True))


def export(weights: Path, folder: Path) -> Path:
    return Path(shutil.copytree(weights / "small", folder / "export"))


def dora(weights: Path, folder: Path) -> Path:
    own = package(weights)
    state = {"model": own["best_state"]}
    torch.save(
        {"xp.cfg": OmegaConf.create(own["xp.cfg"]), **state, "best_state": state}, folder / "checkpoint.th"
    )
    return folder / "checkpoint.th"


def cog_trainer(weights: Path, folder: Path) -> Path:
    own = package(weights)
    config = OmegaConf.create(own["xp.cfg"])
    torch.save({"xp.cfg": config, "model": own["best_state"]}, folder / "trained_model.tar")
    return folder / "trained_model.tar"


def bare(weights: Path, folder: Path) -> Path:
    torch.save(package(weights)["best_state"], folder / "lm_final.pt")
    return folder / "lm_final.pt"


def lightning(weights: Path, folder: Path) -> Path:
    state = {f"model.{name}": tensor for name, tensor in package(weights)["best_state"].items()}
    torch.save({"state_dict": state, "epoch": 3}, folder / "last.ckpt")
    return folder / "last.ckpt"


def transformers_folder(weights: Path, folder: Path) -> Path:
    model = model_of("musicgen")
    model.text_encoder.resize_token_embeddings(400)
    model.save_pretrained(folder / "hf")
    for file in (weights / "t5-small").glob("tokenizer*"):
        shutil.copy(file, folder / "hf")
    return folder / "hf"


def lora(_: Path, folder: Path) -> Path:
    layer = "base_model.model.decoder.model.decoder.layers.0.self_attn.q_proj"
    save_file(
        {f"{layer}.lora_A.weight": torch.randn(4, 64), f"{layer}.lora_B.weight": torch.randn(64, 4)},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    config["base_model_name_or_path"] = "facebook/musicgen-small"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def archive(weights: Path, folder: Path) -> Path:
    file = cog_trainer(weights, folder)
    with zipfile.ZipFile(folder / "upload.zip", "w") as out:
        out.write(file, "output/model.pt")
    return folder / "upload.zip"


FORMATS: dict[str, Make] = {
    "audiocraft export": export,
    "dora checkpoint": dora,
    "Cog trainer's file": cog_trainer,
    "bare state dict": bare,
    "Lightning checkpoint": lightning,
    "transformers folder": transformers_folder,
    "LoRA adapter": lora,
    "archive": archive,
}


@pytest.fixture
def places(weights: Path, tmp_path: Path) -> Path:
    """The tiny weights where something may be unpacked beside them."""
    folder = tmp_path / "weights"
    folder.mkdir()
    for part in weights.iterdir():
        (folder / part.name).symlink_to(part)
    return folder


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_served(places: Path, tmp_path: Path, name: str) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    given = FORMATS[name](places, checkpoint)
    loader = Loader(Weights.at(places, read_catalog(), str(given)), CPU, Settings())
    model = loader.start()
    assert model.name == "finetuned" and len(model.content_hash) == 64
    random = GlobalRandom(0, CPU)
    score = prepare(model, prompt="rock", frames=50, melody=None, clip_tokens=None, random=random)
    tokens, _ = generate(model, score, SamplingParams(), torch.Generator().manual_seed(0))
    sound = model.codec.decode(tokens)
    assert sound.shape == (1, 32_000) and sound.isfinite().all() and sound.std() > 0


def test_the_documentation_names_the_formats_that_are_served() -> None:
    page = (Path(__file__).parents[2] / "docs" / "weights.md").read_text()
    table = page.split("| checkpoint |", 1)[1].split("\n\n", 1)[0]
    assert re.findall(r"^\| \*\*(.*?)\*\*", table, flags=re.MULTILINE) == list(FORMATS)


def test_a_codec_of_another_size_is_refused_by_name(places: Path, tmp_path: Path) -> None:
    own = dict(torch.load(places / "small" / "state_dict.bin", weights_only=True))
    torch.save(
        own["best_state"], tmp_path / "lm.pt"
    )  # 400 entries; encodec_32khz, taken for granted, has 512
    with pytest.raises(WeightsError, match="4 codebooks of 400 entries, and its codec has 4 of 512"):
        Loader(Weights.at(places, read_catalog(), str(tmp_path / "lm.pt")), CPU, Settings()).start()


def test_an_adapters_strength_is_part_of_what_is_said_of_it(places: Path, tmp_path: Path) -> None:
    """It goes into the file's tags: the hash of the files alone would not reproduce the piece."""
    given = str(lora(places, tmp_path))
    formats = [
        Loader(Weights.at(places, read_catalog(), given), CPU, Settings(lora_strength=strength))
        .start()
        .format
        for strength in (1.0, 0.5)
    ]
    assert formats == ["LoRA adapter", "LoRA adapter at strength 0.5"]
