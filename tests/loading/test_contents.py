"""The files of a model and its parts, and their hashes, without loading them."""

import shutil
from pathlib import Path

import pytest
import torch

from musicgen_svc.errors import WeightsError
from musicgen_svc.loading.contents import CODEC, DECODER, SEPARATOR, TEXT
from musicgen_svc.loading.loader import Loader
from musicgen_svc.settings import Settings
from musicgen_svc.weights.catalog import read_catalog
from musicgen_svc.weights.lock_file import sha256_of
from musicgen_svc.weights.paths import Weights

FILES = {
    CODEC: "melody/compression_state_dict.bin",
    TEXT: "t5-small/model.safetensors",
    SEPARATOR: "htdemucs/955717e8.safetensors",
    DECODER: "multiband-diffusion/mbd_musicgen_32khz.th",
}


@pytest.fixture
def folder(weights: Path, tmp_path: Path) -> Path:
    """Weights of which files can be replaced."""
    return Path(shutil.copytree(weights, tmp_path / "weights"))


def loader(folder: Path) -> Loader:
    return Loader(Weights.at(folder, read_catalog(), None), torch.device("cpu"), Settings())


@pytest.mark.parametrize("part", FILES)
def test_a_part_that_is_needed_is_among_the_files(folder: Path, part: str) -> None:
    contents = loader(folder).contents
    model, parts = contents.files("melody", (part,))
    assert [path.name for path in model] == ["state_dict.bin"]
    assert contents.sha256(model) == sha256_of(folder / "melody" / "state_dict.bin")
    assert folder / FILES[part] in parts
    others = contents.files("melody", tuple(other for other in FILES if other != part))[1]
    assert folder / FILES[part] not in others


def test_a_file_that_is_replaced_meanwhile_has_another_hash(folder: Path) -> None:
    contents, file = loader(folder).contents, folder / FILES[DECODER]
    before = contents.sha256(contents.files("melody", (CODEC, DECODER))[1])
    package = torch.load(file, weights_only=False)
    torch.save({**package, "another": 1}, file.with_suffix(".new"))
    file.with_suffix(".new").replace(file)
    assert contents.sha256(contents.files("melody", (CODEC, DECODER))[1]) != before
    file.unlink()
    with pytest.raises(WeightsError):
        contents.files("melody", (CODEC, DECODER))


def test_no_model_is_loaded_for_a_hash(folder: Path) -> None:
    found = loader(folder)
    found.contents.sha256(found.contents.files("melody", tuple(FILES))[1])
    assert not found.in_memory("melody")
