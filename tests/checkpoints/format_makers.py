"""Functions that write a tiny model in each of the formats that are served."""

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from transformers_models import model_of

Make = Callable[[Path, Path], Path]
"""Takes the tiny weights and a folder to write to, and returns the path of the checkpoint."""


def package(weights: Path) -> dict[str, Any]:
    """The package of a language model with the codec encodec_32khz, which formats without a codec assume."""
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
