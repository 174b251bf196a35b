"""The released models' names and shapes, from their published dimensions, against what we build.

`released_shapes.json` lists them for each model, its layers written once as `layers.{i}`.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_lms
import torch
from omegaconf import OmegaConf
from tiny_lms import build_lm
from torch import nn

from musicgen_svc.checkpoints import Checkpoint
from musicgen_svc.checkpoints.configs import lm_config
from musicgen_svc.checkpoints.infer_config import infer_config
from musicgen_svc.models.conditioners import Conditioner, TextConditioner, build_melody_conditioner
from tests.fixtures import tiny_models

TABLE = Path(__file__).parent / "released_shapes.json"
META = torch.device("meta")
CARD, TEXT_WIDTH, CHROMA, WINDOW = 2048, 768, 12, 16_384
SIZES = {"small": (1024, 24, 16), "medium": (1536, 48, 24), "large": (2048, 48, 32)}  # width, layers, heads
MODELS: dict[str, tuple[str, bool, int]] = {  # size, melody, codebooks
    "small": ("small", False, 4),
    "medium": ("medium", False, 4),
    "large": ("large", False, 4),
    "melody": ("medium", True, 4),
    "melody-large": ("large", True, 4),
    "stereo-small": ("small", False, 8),
    "stereo-medium": ("medium", False, 8),
    "stereo-large": ("large", False, 8),
    "stereo-melody": ("medium", True, 8),
    "stereo-melody-large": ("large", True, 8),
}
PUBLISHED_PARAMETERS = {"small": 420e6, "medium": 1.84e9, "large": 3.26e9, "melody": 1.39e9}


def shapes(size: str, melody: bool, codebooks: int) -> dict[str, list[int]]:
    """The formula: no biases but the norms' and the projections', a feed-forward part four times as wide."""
    d, _, _ = SIZES[size]
    layer = "transformer.layers.{i}."
    attentions = ["self_attn"] if melody else ["self_attn", "cross_attention"]
    norms = ["norm1", "norm2"] if melody else ["norm1", "norm2", "norm_cross"]
    conditioners = {"description": TEXT_WIDTH} | ({"self_wav": CHROMA} if melody else {})
    table = {f"emb.{k}.weight": [CARD + 1, d] for k in range(codebooks)}
    table |= {f"linears.{k}.weight": [CARD, d] for k in range(codebooks)}
    table |= {f"out_norm.{part}": [d] for part in ("weight", "bias")}
    table |= {f"{layer}{name}.in_proj_weight": [3 * d, d] for name in attentions}
    table |= {f"{layer}{name}.out_proj.weight": [d, d] for name in attentions}
    table |= {f"{layer}{name}.{part}": [d] for name in norms for part in ("weight", "bias")}
    table |= {f"{layer}linear1.weight": [4 * d, d], f"{layer}linear2.weight": [d, 4 * d]}
    for name, width in conditioners.items():
        table |= {f"{tiny_lms.PROVIDER}{name}.output_proj.{part}": shape
                  for part, shape in (("weight", [d, width]), ("bias", [d]))}  # fmt: skip
    if melody:
        table[tiny_lms.PROVIDER + "self_wav.chroma.spec.window"] = [WINDOW]
    return table


def expanded(name: str) -> dict[str, tuple[int, ...]]:
    """The committed table, with every layer."""
    layers = SIZES[MODELS[name][0]][1]
    return {
        key.replace("{i}", str(i)): tuple(shape)
        for key, shape in json.loads(TABLE.read_text())[name].items()
        for i in (range(layers) if "{i}" in key else [0])
    }


def released_config(name: str) -> dict[str, Any]:
    """The configuration that the released checkpoint carries."""
    size, melody, codebooks = MODELS[name]
    width, layers, heads = SIZES[size]
    config = tiny_models.lm_config("melody" if melody else "stereo" if codebooks == 8 else "small")
    config["transformer_lm"] |= {
        "dim": width, "num_layers": layers, "num_heads": heads, "card": CARD, "n_q": codebooks,
    }  # fmt: skip
    if codebooks == 8:
        stereo = tiny_models.lm_config("stereo")
        for section in ("codebooks_pattern", "channels", "interleave_stereo_codebooks"):
            config[section] = stereo[section]
    config["conditioners"]["description"]["t5"]["name"] = "t5-base"
    return config


def test_the_committed_table_is_the_formulas() -> None:
    assert json.loads(TABLE.read_text()) == {name: shapes(*model) for name, model in MODELS.items()}


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_the_table_has_as_many_parameters_as_were_published(name: str) -> None:
    total = sum(torch.Size(shape).numel() for key, shape in expanded(name).items() if "window" not in key)
    assert total == pytest.approx(PUBLISHED_PARAMETERS[name], rel=0.005)


@pytest.mark.parametrize("name", MODELS)
def test_what_we_build_has_these_names_and_shapes_and_no_others(name: str) -> None:
    table = expanded(name)
    config = lm_config(released_config(name), "The test")
    text = TextConditioner(nn.Identity(), None, TEXT_WIDTH, config.transformer_lm.dim)
    melody = None
    if MODELS[name][1]:
        melody = build_melody_conditioner(config, lambda wav, _: wav, 32_000, META)
    state = {key: torch.empty(shape, device="meta") for key, shape in table.items()}
    lm = build_lm(Checkpoint(config, state), Conditioner(text, melody), META)  # refuses any difference
    assert {key: tuple(tensor.shape) for key, tensor in lm.state_dict().items()} == table


@pytest.mark.parametrize("name", MODELS)
def test_the_tensors_alone_tell_the_configuration(name: str) -> None:
    state = {key: torch.empty(shape, device="meta") for key, shape in expanded(name).items()}
    inferred = OmegaConf.to_container(infer_config(state, "The test"))
    released = OmegaConf.to_container(OmegaConf.create(released_config(name)), resolve=True)
    for section in ("transformer_lm", "codebooks_pattern", "fuser", "channels", "dataset"):
        assert inferred[section] == released[section], section
    assert inferred["conditioners"]["description"] == released["conditioners"]["description"]
