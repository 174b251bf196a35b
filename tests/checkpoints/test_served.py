"""Every format in the README's table is loaded as `finetuned` and generates."""

import re
from pathlib import Path

import pytest
import torch
from format_makers import FORMATS, lora

from musicgen_svc.engine.sampling_params import SamplingParams
from musicgen_svc.errors import WeightsError
from musicgen_svc.generation import generate, prepare
from musicgen_svc.loading.loader import Loader
from musicgen_svc.runtime.randomness import GlobalRandom
from musicgen_svc.settings import Settings
from musicgen_svc.weights.catalog import read_catalog
from musicgen_svc.weights.paths import Weights

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_served(writable_weights: Path, tmp_path: Path, name: str) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    given = FORMATS[name](writable_weights, checkpoint)
    loader = Loader(Weights.at(writable_weights, read_catalog(), str(given)), CPU, Settings())
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


def test_a_codec_of_another_size_is_refused_by_name(writable_weights: Path, tmp_path: Path) -> None:
    own = dict(torch.load(writable_weights / "small" / "state_dict.bin", weights_only=True))
    torch.save(
        own["best_state"], tmp_path / "lm.pt"
    )  # 400 entries; encodec_32khz, taken for granted, has 512
    with pytest.raises(WeightsError, match="4 codebooks of 400 entries, and its codec has 4 of 512"):
        Loader(Weights.at(writable_weights, read_catalog(), str(tmp_path / "lm.pt")), CPU, Settings()).start()


def test_an_adapters_strength_is_part_of_what_is_said_of_it(writable_weights: Path, tmp_path: Path) -> None:
    """It goes into the file's tags: the hash of the files alone would not reproduce the piece."""
    given = str(lora(writable_weights, tmp_path))
    formats = [
        Loader(Weights.at(writable_weights, read_catalog(), given), CPU, Settings(lora_strength=strength))
        .start()
        .format
        for strength in (1.0, 0.5)
    ]
    assert formats == ["LoRA adapter", "LoRA adapter at strength 0.5"]
