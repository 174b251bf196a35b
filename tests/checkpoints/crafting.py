"""Makers of checkpoints that are valid but for one thing."""

import base64
import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from musicgen_svc.checkpoints.unpickle import _ALLOWED_TYPES
from tests.fixtures import tiny_codecs, tiny_models

Package = dict[str, Any]


@dataclass(frozen=True)
class Files:
    """Where the valid checkpoints lie, and the folder that the crafted one is made in."""

    weights: Path
    folder: Path

    def copy(self, name: str) -> Path:
        """The folder, holding a copy of what is in that one of the weights."""
        return Path(shutil.copytree(self.weights / name, self.folder, dirs_exist_ok=True))

    def beside(self, name: str) -> Path:
        """A part's folder inside the crafted one, as valid as elsewhere."""
        return Path(shutil.copytree(self.weights / name, self.folder / name))


Make = Callable[[Files], object]


def changed(tree: Any, path: str, value: Any) -> Any:
    """The tree with the value in the place of the one at a dotted path."""
    *steps, last = path.split(".")
    node = tree
    for step in steps:
        node = node[step]
    node[last] = value
    return tree


def lm(change: Callable[[Package], object], name: str = "small", *, raw: bool = False) -> Make:
    """The language model's package with its configuration as a dictionary (and not as YAML), changed."""

    def make(files: Files) -> None:
        path = files.copy(name) / "state_dict.bin"
        package = torch.load(path, weights_only=True)
        package["xp.cfg"] = tiny_models.lm_config(name)
        change(package)
        if not raw and isinstance(package["xp.cfg"], dict):
            package["xp.cfg"] = json.dumps(package["xp.cfg"])  # which is YAML
        torch.save(package, path)

    return make


def lm_field(path: str, value: Any, name: str = "small") -> Make:
    return lm(lambda package: changed(package["xp.cfg"], path, value), name, raw=True)


def yaml_after(text: str) -> Make:
    """YAML behind that of a valid configuration."""

    def change(package: Package) -> None:
        package["xp.cfg"] = OmegaConf.to_yaml(OmegaConf.create(package["xp.cfg"])) + text

    return lm(change, raw=True)


def tensors(change: Callable[[dict[str, torch.Tensor]], object], name: str = "small") -> Make:
    return lm(lambda package: change(package["best_state"]), name)


def codec_field(path: str, value: Any) -> Make:
    def make(files: Files) -> None:
        file = files.copy("small") / "compression_state_dict.bin"
        package = torch.load(file, weights_only=True)
        package["xp.cfg"] = changed(tiny_codecs.codec_config(), path, value)
        torch.save(package, file)

    return make


def json_fields(part: str, file: str, base: str = "small", **values: Any) -> Make:
    """A JSON file of a part, with other values."""

    def make(files: Files) -> None:
        files.copy(base)
        path = files.beside(part) / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return make


def diffusion(change: Callable[[Package], object]) -> Make:
    def make(files: Files) -> None:
        files.copy("small")
        path = files.beside("multiband-diffusion") / "mbd_musicgen_32khz.th"
        with torch.serialization.safe_globals(_ALLOWED_TYPES):
            package = torch.load(path, weights_only=True)
        for band in range(4):
            package[band]["cfg"] = OmegaConf.to_container(package[band]["cfg"])
        change(package)
        torch.save(package, path)

    return make


def demucs(listing: str | None = None, metadata: Package | None = None, **arguments: Any) -> Make:
    def make(files: Files) -> None:
        files.copy("melody")
        folder = files.beside("htdemucs")
        if listing is not None:
            (folder / "htdemucs.yaml").write_text(listing)
        path = next(folder.glob("*.safetensors"))
        with safe_open(path, "pt") as file:
            own = file.metadata()
        own["kwargs"] = json.dumps(json.loads(own["kwargs"]) | arguments)
        save_file(load_file(path), path, own | (metadata or {}))

    return make


def adapter(a: torch.Tensor, b: torch.Tensor, **settings: Any) -> Make:
    """A LoRA adapter of `small` for one of its heads."""

    def make(files: Files) -> None:
        own = {"peft_type": "LORA", "base_model_name_or_path": "facebook/musicgen-small", "lora_alpha": 1}
        (files.folder / "adapter_config.json").write_text(json.dumps(own | settings))
        named = {"base_model.model.linears.0.lora_A.weight": a, "base_model.model.linears.0.lora_B.weight": b}
        save_file(named, files.folder / "adapter_model.safetensors")

    return make


def deflated(files: Files) -> None:
    """The pickle of a torch.save file is compressed to a thousandth of what it takes."""
    path = files.copy("small") / "state_dict.bin"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        file.writestr("archive/version", "3\n")
        with file.open("archive/data.pkl", "w", force_zip64=True) as pickle:
            pickle.write(b"\x80\x02")
            for _ in range(32):
                pickle.write(bytes(1 << 20))


def nested(levels: int) -> Any:
    """Two entries a level, each the same object: few bytes in a pickle, 2 ** levels entries when copied."""
    value: Any = [1]
    for _ in range(levels):
        value = [value, value]
    return value


def stride_0(state: dict[str, torch.Tensor]) -> None:
    for name, tensor in state.items():
        state[name] = torch.zeros(1).expand(tensor.shape)


def one_storage(state: dict[str, torch.Tensor]) -> None:
    """All tensors are views of the largest one's numbers."""
    numbers = torch.randn(max(tensor.numel() for tensor in state.values()))
    for name, tensor in state.items():
        state[name] = numbers[: tensor.numel()].view(tensor.shape)


def charsmap(content: bytes) -> Make:
    """SentencePiece's table of characters: the length of a tree, the tree, and texts that it leads to."""
    table = base64.b64encode(content).decode()
    normalizer = {"type": "Precompiled", "precompiled_charsmap": table}
    return json_fields("t5-small", "tokenizer.json", normalizer=normalizer)


class Call:
    """Pickled, it is a call of a function that torch.load holds for harmless."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self._call


def pickled(value: Any, **options: Any) -> Make:
    def make(files: Files) -> None:
        path = files.copy("small") / "state_dict.bin"
        torch.save(torch.load(path, weights_only=True) | {"x": value}, path, **options)

    return make
