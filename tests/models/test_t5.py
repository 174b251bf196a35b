"""Our T5 encoder computes the numbers of transformers', from all files that transformers writes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from musicgen_svc.checkpoints import TransformersPart
from musicgen_svc.checkpoints.transformers_part import read_transformers_part
from musicgen_svc.errors import WeightsError
from musicgen_svc.models.t5 import load_t5
from musicgen_svc.models.t5_tokenizer import load_tokenizer

CPU = torch.device("cpu")
SIZE: dict[str, Any] = {
    "vocab_size": 50, "d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 3, "num_heads": 4,
}  # fmt: skip
TOKENS = torch.randint(0, 50, (3, 150), generator=torch.Generator().manual_seed(1))
"""Longer than the largest distance that has a bucket of its own."""
MASK = torch.ones_like(TOKENS)
MASK[1, 40:] = 0
MASK[2] = 0


def model_of(activation: str = "relu", **more: Any) -> Any:
    """Makes transformers' model, with a decoder, which the released files have too."""
    torch.manual_seed(3)
    config = transformers.T5Config(**SIZE, feed_forward_proj=activation, decoder_start_token_id=0, **more)
    model = transformers.T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_norm" not in name:
                parameter.normal_(0, 0.3)  # with the initial weights the attention is nearly uniform
    return model


def theirs(model: Any, mask: torch.Tensor = MASK) -> torch.Tensor:
    with torch.inference_mode():
        hidden: torch.Tensor = model.encoder(TOKENS, attention_mask=mask).last_hidden_state
    return hidden


@torch.inference_mode()
def ours(source: Path | TransformersPart, mask: torch.Tensor = MASK) -> torch.Tensor:
    part = source if isinstance(source, TransformersPart) else read_transformers_part(source)
    hidden: torch.Tensor = load_t5(part, CPU)(TOKENS, mask)
    return hidden


@pytest.mark.parametrize("more", [{}, {"relative_attention_num_buckets": 12, "layer_norm_epsilon": 1e-2}])
def test_the_numbers_are_transformers_bit_for_bit(more: dict[str, Any], tmp_path: Path) -> None:
    model = model_of(**more)
    model.save_pretrained(tmp_path)
    assert torch.equal(ours(tmp_path), theirs(model))
    full = torch.ones_like(MASK)
    assert torch.equal(ours(tmp_path, full), theirs(model, full))
    assert not torch.allclose(ours(tmp_path), ours(tmp_path, full), atol=1e-2), "the mask has an effect"


def test_the_gated_variant_has_the_same_numbers(tmp_path: Path) -> None:
    model = model_of("gated-gelu")
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(ours(tmp_path), theirs(model), rtol=0, atol=1e-5)


def test_shards_pickles_half_precision_and_the_encoder_alone_load(tmp_path: Path) -> None:
    model = model_of()
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    model.config.save_pretrained(tmp_path / "pickle")
    torch.save(model.state_dict(), tmp_path / "pickle" / "pytorch_model.bin")
    alone = transformers.T5EncoderModel(model.config)
    alone.load_state_dict(model.state_dict(), strict=False)
    alone.save_pretrained(tmp_path / "alone")
    for folder in ("shards", "pickle", "alone"):
        assert torch.equal(ours(tmp_path / folder), theirs(model)), folder
    model.half().save_pretrained(tmp_path / "half")
    assert load_t5(read_transformers_part(tmp_path / "half"), CPU).shared.weight.dtype == torch.float32
    assert torch.equal(ours(tmp_path / "half"), theirs(model.float()))


def test_a_part_of_a_checkpoint_loads(tmp_path: Path) -> None:
    model = transformers.T5EncoderModel(model_of().config).eval()
    part = TransformersPart(model.config.to_diff_dict() | SIZE, model.state_dict(), "The checkpoint")
    assert torch.equal(ours(part), theirs(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bart"}, "holds a 'bart'; the text encoder must be a 't5'"),
        (
            {"feed_forward_proj": "gated-silu"},
            "feed_forward_proj 'gated-silu'; it must be 'relu' or 'gated-gelu'",
        ),
        ({"num_layers": 0}, "num_layers 0; it must be an integer from 1 to 128"),
        ({"num_layers": "two"}, "num_layers 'two'; it must be an integer"),
        ({"num_layers": 10_000_000}, "num_layers 10000000; it must be an integer"),
        ({"relative_attention_max_distance": 0}, "max_distance 0; it must be an integer from 2"),
        ({"relative_attention_max_distance": 8}, "the second more than a quarter of it"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon nan; it must be a number above 0"),
        ({"d_ff": 41}, r"does not fit its configuration as a T5 encoder: it has 6 tensors \("),
        ({"num_layers": 4}, "num_layers is 4 there, and the tensors have 3"),
    ],
)
def test_a_field_that_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    model = transformers.T5EncoderModel(model_of().config)
    part = TransformersPart(model.config.to_dict() | change, model.state_dict(), "The checkpoint")
    with pytest.raises(WeightsError, match=f"^The checkpoint .*{message}"):
        load_t5(part, CPU)


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    for load in (lambda: read_transformers_part(tmp_path), lambda: load_tokenizer(tmp_path, 1)):
        with pytest.raises(WeightsError, match=str(tmp_path)):
            load()


def test_a_tokenizers_settings_name_no_file_elsewhere(weights: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(weights / "t5-small", tmp_path / "own"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    shutil.copy(folder / "tokenizer.json", tmp_path / "tokenizer.4.0.0.json")
    settings["fast_tokenizer_files"] = ["../tokenizer.4.0.0.json"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(WeightsError, match=r"tokenizer_config\.json names '\.\./tokenizer\.4\.0\.0\.json'"):
        load_tokenizer(folder, 40_000)
