"""Files for `load.py`: random weights in the formats, names and sizes of the released ones."""

import contextlib
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
"""Name of a folder -> the dtype of the language model in it."""
T5_BASE = {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "vocab_size": 32_128}


@contextlib.contextmanager
def weights_folder(folder: Path | None) -> Iterator[Path]:
    """Provides both language models, T5, and the tiny models that a process warms up with.

    Args:
        folder: where the files are kept and found the next time. None: a temporary folder.
    """
    if folder is not None:
        build(folder)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="musicgen-bench-") as temporary:
        build(Path(temporary))
        yield Path(temporary)


def build(folder: Path) -> None:
    """Writes all files into a folder, unless an earlier call has completed it."""
    from tests.fixtures import tiny_weights

    if (folder / "complete").is_file():
        return
    print(f"Writing 4 GB of random weights into {folder} ...")
    tiny = tiny_weights.ensure(ROOT)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("small", "t5-small"):
        shutil.copytree(tiny / name, folder / name, dirs_exist_ok=True)
    save_t5(folder / "t5-base")
    lm, codec = lm_package("small"), codec_package()
    for files, dtype in DTYPES.items():
        state = {name: tensor.to(dtype) for name, tensor in lm["best_state"].items()}
        save_checkpoint(folder / files, lm | {"best_state": state}, codec)
    (folder / "complete").touch()


def save_checkpoint(folder: Path, lm: dict[str, Any], codec: dict[str, Any]) -> None:
    """Saves a language model and its codec, each as `lm_package` and `codec_package` return it."""
    folder.mkdir(exist_ok=True)
    torch.save(lm, folder / "state_dict.bin")
    torch.save(codec, folder / "compression_state_dict.bin")


def lm_package(model: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
    """Makes audiocraft's export of a text model.

    Args:
        model: a name in `SIZES`.
        dtype: of the tensors.
        device: where the random weights are drawn. The result is on the CPU.
    """
    from benchmarks.random_models import SIZES, language_model
    from tests.fixtures import tiny_codecs, tiny_models

    size = SIZES[model]
    assert size["kind"] == "text", model
    state = language_model(**size, dtype=dtype, device=device).state_dict()
    projection = torch.nn.Linear(T5_BASE["d_model"], size["dim"]).state_dict()
    prefix = "condition_provider.conditioners.description.output_proj."
    state |= {prefix + name: tensor for name, tensor in projection.items()}
    state = {name: tensor.to("cpu", dtype) for name, tensor in state.items()}
    config = tiny_models.lm_config("small")
    config["transformer_lm"] |= {
        "dim": size["dim"], "num_layers": size["layers"], "num_heads": size["heads"], "card": 2048,
    }  # fmt: skip
    config["conditioners"]["description"]["t5"]["name"] = "t5-base"
    return tiny_codecs.package(state, config)


def codec_package() -> dict[str, Any]:
    """Makes audiocraft's export of EnCodec at 32 kHz."""
    from omegaconf import OmegaConf

    from musicgen_svc.audiocraft_compat import builders
    from tests.fixtures import tiny_codecs

    config = tiny_codecs.codec_config()
    config["seanet"] |= {"dimension": 128, "n_filters": 64}
    config["rvq"]["bins"] = 2048
    with warnings.catch_warnings():  # audiocraft uses the weight norm that torch deprecates
        warnings.simplefilter("ignore", FutureWarning)
        model = builders.get_compression_model(OmegaConf.create(config | {"device": "cpu"}))
    return tiny_codecs.package(model.state_dict(), config)


def save_t5(folder: Path, device: str = "cpu") -> None:
    """Saves T5 with its decoder, as in the released file, and a tokenizer of the real size.

    Its random weights are drawn on `device`.
    """
    from transformers import T5Config, T5ForConditionalGeneration, T5Tokenizer

    with torch.device(device):
        model = T5ForConditionalGeneration(T5Config(**T5_BASE, decoder_start_token_id=0))
    model.save_pretrained(folder)
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    T5Tokenizer(vocab=words + [(f"▁w{i}", -10.0) for i in range(32_000 - 4)]).save_pretrained(folder)


def read_all(*folders: Path) -> None:
    """Reads all files once, so that both sides find them in the page cache."""
    for folder in folders:
        for path in folder.iterdir():
            with path.open("rb", buffering=0) as file:
                while file.read(1 << 24):
                    pass
