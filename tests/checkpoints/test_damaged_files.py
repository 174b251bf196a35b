"""A file that cannot be read is named, with what is wrong with it: each file of each format, in each way."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from format_makers import bare, cog_trainer, dora, lightning, lora
from safetensors.torch import save_file
from transformers_models import model_of

from musicgen_svc.errors import WeightsError
from musicgen_svc.loading.loader import Loader
from musicgen_svc.settings import Settings
from musicgen_svc.weights.catalog import read_catalog
from musicgen_svc.weights.lock_file import LOCK_FILE, check_sizes
from musicgen_svc.weights.paths import Weights

CPU = torch.device("cpu")
POINTER = b"""version https://git-lfs.github.com/spec/v1
oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393
size 1151000000
"""
PAGE = b"\n<!DOCTYPE html><html><head><title>Sign in</title></head><body>\xc3\x97</body></html>\n"
Make = Callable[[Path, Path], Path]


def folder_of(name: str) -> Make:
    return lambda weights, folder: Path(shutil.copytree(weights / name, folder / name))


def with_own(part: str, name: str = "small") -> Make:
    def make(weights: Path, folder: Path) -> Path:
        own = folder_of(name)(weights, folder)
        shutil.copytree(weights / part, own / part)
        return own

    return make


def in_folder(make: Make) -> Make:
    return lambda weights, folder: make(weights, folder).parent


def older_layout(weights: Path, folder: Path) -> Path:
    package = torch.load(weights / "small" / "state_dict.bin", weights_only=True)
    torch.save(package, folder / "older.pt", _use_new_zipfile_serialization=False)
    return folder / "older.pt"


def bare_safetensors(weights: Path, folder: Path) -> Path:
    package = torch.load(weights / "hf-codec" / "state_dict.bin", weights_only=True)
    save_file(package["best_state"], folder / "lm.safetensors")
    return folder / "lm.safetensors"


def transformers(shard: str) -> Make:
    def make(weights: Path, folder: Path) -> Path:
        model_of("musicgen").save_pretrained(folder / "hf", max_shard_size=shard)
        for file in (weights / "t5-small").glob("tokenizer*"):
            shutil.copy(file, folder / "hf")
        return folder / "hf"

    return make


def older_transformers(weights: Path, folder: Path) -> Path:
    made = transformers("50GB")(weights, folder)
    (made / "model.safetensors").unlink()
    torch.save(model_of("musicgen").state_dict(), made / "pytorch_model.bin")
    return made


def archive(kind: str) -> Make:
    def make(weights: Path, folder: Path) -> Path:
        return Path(shutil.make_archive(str(folder / "upload"), kind, folder_of("small")(weights, folder)))

    return make


CASES: dict[str, tuple[Make, str]] = {
    "export, model": (folder_of("small"), "state_dict.bin"),
    "export, codec": (folder_of("small"), "compression_state_dict.bin"),
    "export, model, named itself": (lambda w, f: folder_of("small")(w, f) / "state_dict.bin", ""),
    "dora": (dora, ""),
    "dora, in a folder": (in_folder(dora), "checkpoint.th"),
    "Cog trainer": (cog_trainer, ""),
    "Cog trainer, in a folder": (in_folder(cog_trainer), "trained_model.tar"),
    "Lightning": (lightning, ""),
    "bare": (bare, ""),
    "bare, older layout": (older_layout, ""),
    "bare, safetensors": (bare_safetensors, ""),
    "bare, safetensors, in a folder": (in_folder(bare_safetensors), "lm.safetensors"),
    "adapter": (lora, "adapter_model.safetensors"),
    "adapter, settings": (lora, "adapter_config.json"),
    "transformers": (transformers("50GB"), "model.safetensors"),
    "transformers, settings": (transformers("50GB"), "config.json"),
    "transformers, tokenizer": (transformers("50GB"), "tokenizer.json"),
    "transformers, index": (transformers("200KB"), "model.safetensors.index.json"),
    "transformers, shard": (transformers("200KB"), "model-00002-of-*.safetensors"),
    "transformers, older": (older_transformers, "pytorch_model.bin"),
    "T5": (with_own("t5-small"), "t5-small/model.safetensors"),
    "T5, settings": (with_own("t5-small"), "t5-small/config.json"),
    "T5, tokenizer": (with_own("t5-small"), "t5-small/tokenizer.json"),
    "T5, tokenizer's settings": (with_own("t5-small"), "t5-small/tokenizer_config.json"),
    "EnCodec": (with_own("encodec_32khz", "hf-codec"), "encodec_32khz/model.safetensors"),
    "EnCodec, settings": (with_own("encodec_32khz", "hf-codec"), "encodec_32khz/config.json"),
    "Demucs": (with_own("htdemucs", "melody"), "htdemucs/955717e8.safetensors"),
    "Demucs, its list": (with_own("htdemucs", "melody"), "htdemucs/htdemucs.yaml"),
    "MultiBand Diffusion": (with_own("multiband-diffusion"), "multiband-diffusion/mbd_musicgen_32khz.th"),
    "tar": (archive("tar"), ""),
    "tar.gz": (archive("gztar"), ""),
    "tar.bz2": (archive("bztar"), ""),
    "tar.xz": (archive("xztar"), ""),
    "zip": (archive("zip"), ""),
}  # fmt: skip


def cut(part: float) -> Callable[[Path], None]:
    """Keeps this part of a file; 1: all but the last byte that matters."""

    def damage(file: Path) -> None:
        content = file.read_bytes().rstrip(b"\0\n ")
        file.write_bytes(content[: min(len(content) - 1, int(len(content) * part) or 1)])

    return damage


def replaced_by_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "pointer": (lambda file: file.write_bytes(POINTER), "is a Git LFS pointer .*run git lfs pull"),
    "empty": (lambda file: file.write_bytes(b""), r"is empty \(0 bytes\)"),
    "page": (lambda file: file.write_bytes(PAGE), "is a web page"),
    "noise": (lambda file: file.write_bytes(random.Random(0).randbytes(5000)), "again"),
    "cut to a byte": (cut(0), "again"),
    "cut to a tenth": (cut(0.1), "again"),
    "cut in half": (cut(0.5), "again"),
    "cut at its end": (cut(1), "again"),
    "folder": (replaced_by_folder, "is a folder|holds no MusicGen"),
    "link to nowhere": (lambda file: (file.unlink(), file.symlink_to("gone")), "is missing"),
}
LIBRARY_WORDS = (
    "Error",
    "Exception",
    "deserializ",
    "pickle",
    "Expecting",
    "Errno",
    "EOF",
    "invalid",
    "PytorchStream",
)


@pytest.fixture(scope="module")
def whole(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """`whole(case)`: a folder that holds the case's checkpoint, made once, and the path to give in it."""
    made: dict[str, tuple[Path, Path]] = {}

    def get(case: str) -> tuple[Path, Path]:
        if case not in made:
            folder = tmp_path_factory.mktemp("whole")
            made[case] = folder, CASES[case][0](weights, folder).relative_to(folder)
        return made[case]

    return get


def start(writable_weights: Path, given: Path, diffusion: bool = False) -> None:
    loader = Loader(Weights.at(writable_weights, read_catalog(), str(given)), CPU, Settings())
    if diffusion:
        place, codec = loader.codec()
        loader.diffusion(place if place == given else given, codec)
    else:
        loader.start()


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("case", CASES)
def test_a_damaged_file_is_named_with_what_to_do(
    case: str, damage: str, whole: Callable[[str], tuple[Path, Path]], writable_weights: Path, tmp_path: Path
) -> None:
    pristine, given = whole(case)
    folder = Path(shutil.copytree(pristine, tmp_path / "given"))
    file = next((folder / given).glob(CASES[case][1])) if CASES[case][1] else folder / given
    spoil, words = DAMAGES[damage]
    spoil(file)
    if damage == "link to nowhere" and file == folder / given:
        words = "where there is nothing"
    with pytest.raises(WeightsError, match=rf"{file.name}\b.*({words})") as caught:
        start(writable_weights, folder / given, diffusion="diffusion" in CASES[case][1])
    said = str(caught.value)
    assert said.endswith(".") and "\n" not in said
    assert not any(word in said for word in LIBRARY_WORDS), said


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_of_what_was_downloaded_is_named(damage: str, tmp_path: Path) -> None:
    file = tmp_path / LOCK_FILE
    file.write_text(json.dumps({"small": {"repository": "r", "revision": "c", "files": {}}}))
    DAMAGES[damage][0](file)
    if damage == "link to nowhere":
        return check_sizes(tmp_path)  # the same as none
    with pytest.raises(WeightsError, match=rf"{LOCK_FILE} is .*: delete it and run scripts/download_weights"):
        check_sizes(tmp_path)
    return None


def test_a_recorded_file_that_became_a_pointer_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "state_dict.bin").write_bytes(POINTER)
    files = {"state_dict.bin": {"size": 1_000_000, "sha256": "0"}}
    entry = {"repository": "r", "revision": "c", "files": files}
    (tmp_path / LOCK_FILE).write_text(json.dumps({"small": entry}))
    with pytest.raises(WeightsError, match=r"state_dict\.bin is a Git LFS pointer .*download_weights small"):
        check_sizes(tmp_path)
