"""Functions that make a checkpoint which is valid but for one thing."""

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
    """The folder of the valid checkpoints, and the folder in which the crafted one is made."""

    weights: Path
    folder: Path

    def copy(self, name: str) -> Path:
        """Copies the files of one of the valid checkpoints into the folder, and returns the folder."""
        return Path(shutil.copytree(self.weights / name, self.folder, dirs_exist_ok=True))

    def beside(self, name: str) -> Path:
        """Copies a valid part into a folder of its own inside the folder, and returns that one."""
        return Path(shutil.copytree(self.weights / name, self.folder / name))


Make = Callable[[Files], object]


def changed(tree: Any, path: str, value: Any) -> Any:
    """The tree after the value at a dotted path was replaced."""
    *steps, last = path.split(".")
    node = tree
    for step in steps:
        node = node[step]
    node[last] = value
    return tree


def lm(change: Callable[[Package], object], name: str = "small", *, raw: bool = False) -> Make:
    """Changes the package of a language model.

    Args:
        change: gets the package, with its configuration as a dictionary.
        raw: whether the changed configuration is saved as a dictionary, and not as YAML.
    """

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
    """Replaces the value at a dotted path of a language model's configuration."""
    return lm(lambda package: changed(package["xp.cfg"], path, value), name, raw=True)


def yaml_after(text: str) -> Make:
    """Appends text to the YAML of a valid configuration."""

    def change(package: Package) -> None:
        package["xp.cfg"] = OmegaConf.to_yaml(OmegaConf.create(package["xp.cfg"])) + text

    return lm(change, raw=True)


def tensors(change: Callable[[dict[str, torch.Tensor]], object], name: str = "small") -> Make:
    """Changes the tensors of a language model."""
    return lm(lambda package: change(package["best_state"]), name)


def codec_field(path: str, value: Any) -> Make:
    """Replaces the value at a dotted path of a codec's configuration."""

    def make(files: Files) -> None:
        file = files.copy("small") / "compression_state_dict.bin"
        package = torch.load(file, weights_only=True)
        package["xp.cfg"] = changed(tiny_codecs.codec_config(), path, value)
        torch.save(package, file)

    return make


def json_fields(part: str, file: str, base: str = "small", **values: Any) -> Make:
    """Replaces values in a JSON file of a part."""

    def make(files: Files) -> None:
        files.copy(base)
        path = files.beside(part) / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return make


def diffusion(change: Callable[[Package], object]) -> Make:
    """Changes the package of MultiBand Diffusion."""

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
    """Replaces the text of Demucs's YAML file, or metadata or class arguments in its safetensors file."""

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
    """Makes a LoRA adapter of `small` for one of its heads, with the factors A and B."""

    def make(files: Files) -> None:
        own = {"peft_type": "LORA", "base_model_name_or_path": "facebook/musicgen-small", "lora_alpha": 1}
        (files.folder / "adapter_config.json").write_text(json.dumps(own | settings))
        named = {"base_model.model.linears.0.lora_A.weight": a, "base_model.model.linears.0.lora_B.weight": b}
        save_file(named, files.folder / "adapter_model.safetensors")

    return make


def deflated(files: Files) -> None:
    """Makes a torch.save file whose pickle is compressed to a thousandth of its size."""
    path = files.copy("small") / "state_dict.bin"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        file.writestr("archive/version", "3\n")
        with file.open("archive/data.pkl", "w", force_zip64=True) as pickle:
            pickle.write(b"\x80\x02")
            for _ in range(32):
                pickle.write(bytes(1 << 20))


def nested(levels: int) -> Any:
    """A list that holds the same object twice on each level: a copy has 2 ** levels entries."""
    value: Any = [1]
    for _ in range(levels):
        value = [value, value]
    return value


def stride_0(state: dict[str, torch.Tensor]) -> None:
    """Replaces each tensor by one stored number with a stride of 0."""
    for name, tensor in state.items():
        state[name] = torch.zeros(1).expand(tensor.shape)


def one_storage(state: dict[str, torch.Tensor]) -> None:
    """Replaces all tensors by views of one array, which is as large as the largest tensor."""
    numbers = torch.randn(max(tensor.numel() for tensor in state.values()))
    for name, tensor in state.items():
        state[name] = numbers[: tensor.numel()].view(tensor.shape)


def charsmap(content: bytes) -> Make:
    """Replaces SentencePiece's table of characters: the length of a tree, the tree, and texts."""
    table = base64.b64encode(content).decode()
    normalizer = {"type": "Precompiled", "precompiled_charsmap": table}
    return json_fields("t5-small", "tokenizer.json", normalizer=normalizer)


class Call:
    """An object whose pickle is a call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self._call


def pickled(value: Any, **options: Any) -> Make:
    """Adds a value to the package of a language model; the options are those of torch.save."""

    def make(files: Files) -> None:
        path = files.copy("small") / "state_dict.bin"
        torch.save(torch.load(path, weights_only=True) | {"x": value}, path, **options)

    return make
