"""Folders of transformers' `save_pretrained`: our model on them computes what transformers' does."""

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_lms
import torch
import transformers
from transformers_models import CARD, DIM, model_of, theirs

from musicgen_svc.checkpoints import CodecPointer, TransformersPart, open_checkpoint
from musicgen_svc.errors import WeightsError


@pytest.fixture(scope="module")
def models() -> Callable[..., Any]:
    made: dict[Any, Any] = {}

    def get(kind: str, channels: int = 1) -> Any:
        if (kind, channels) not in made:
            made[kind, channels] = model_of(kind, channels)
        return made[kind, channels]

    return get


KINDS = [("musicgen", 1), ("musicgen", 2), ("musicgen_melody", 1), ("musicgen_melody", 2)]


@pytest.mark.parametrize(("kind", "channels"), KINDS)
@pytest.mark.parametrize("shard", ["50GB", "200KB"])
def test_logits_are_transformers(kind: str, channels: int, shard: str, models: Any, tmp_path: Path) -> None:
    model = models(kind, channels)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) is (shard != "50GB")
    opened = open_checkpoint(tmp_path)
    assert opened.format == f"transformers folder ({kind})"
    lm, expected = opened.lm(), theirs(model)
    assert expected.std() > 0.3
    torch.testing.assert_close(tiny_lms.logits(lm), expected, rtol=0, atol=1e-4)
    assert opened.config() == lm.config
    assert lm.config.interleave_stereo_codebooks.use is (channels == 2)
    assert lm.config.codebooks_pattern.delay.delays == (
        [0, 1, 2, 3] if channels == 1 else [0, 0, 1, 1, 2, 2, 3, 3]
    )
    assert lm.config.dataset.segment_duration == 30


def test_the_codec_inside_decodes_as_transformers_does(models: Any, tmp_path: Path) -> None:
    model = models("musicgen")
    model.save_pretrained(tmp_path)
    part = open_checkpoint(tmp_path).codec()
    assert isinstance(part, TransformersPart)
    codec = transformers.EncodecModel(transformers.EncodecConfig(**part.config)).eval()
    codec.load_state_dict(part.state)
    codes = torch.randint(0, CARD, (1, 1, 4, 20))
    with torch.inference_mode():
        expected = model.audio_encoder.decode(codes, [None]).audio_values
        assert torch.equal(codec.decode(codes, [None]).audio_values, expected)


def test_the_codec_inside_loads_in_the_older_spelling_of_weight_norm(models: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    models("musicgen").save_pretrained(tmp_path)
    new = open_checkpoint(tmp_path).codec()
    state = load_file(tmp_path / "model.safetensors")
    older = {
        name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): tensor
        for name, tensor in state.items()
    }
    assert older.keys() != state.keys()
    save_file(older, tmp_path / "model.safetensors")
    old = open_checkpoint(tmp_path).codec()
    assert old.state.keys() == new.state.keys()
    assert all(torch.equal(old.state[name], new.state[name]) for name in new.state)


def test_the_text_encoder_inside_is_complete_and_transformers(models: Any, tmp_path: Path) -> None:
    model = models("musicgen")
    model.save_pretrained(tmp_path)
    part = open_checkpoint(tmp_path).text_encoder()
    assert part is not None
    encoder = transformers.T5EncoderModel(transformers.T5Config(**part.config)).eval()
    encoder.load_state_dict(part.state)
    tokens = torch.randint(0, 40, (2, 6))
    with torch.inference_mode():
        assert torch.equal(encoder(tokens).last_hidden_state, model.text_encoder(tokens).last_hidden_state)


def test_a_text_encoding_as_wide_as_the_model_needs_no_projection(tmp_path: Path) -> None:
    """transformers leaves it out; ours is the identity."""
    model = model_of("musicgen", dim=24)
    assert not hasattr(model, "enc_to_dec_proj")
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(
        tiny_lms.logits(open_checkpoint(tmp_path).lm()), theirs(model), rtol=0, atol=1e-4
    )


def rewritten(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def test_weights_of_older_versions_load(models: Any, tmp_path: Path) -> None:
    """As a torch.save file, and with the table of positions, which is a constant, among them."""
    model = models("musicgen")
    model.save_pretrained(tmp_path)
    table = {"decoder.model.decoder.embed_positions.weights": torch.ones(2048, DIM)}
    rewritten(tmp_path, lambda state: state.update(table))
    torch.testing.assert_close(
        tiny_lms.logits(open_checkpoint(tmp_path).lm()), theirs(model), rtol=0, atol=1e-4
    )
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    opened = open_checkpoint(tmp_path)
    assert opened.format == "transformers folder (musicgen)"
    torch.testing.assert_close(tiny_lms.logits(opened.lm()), theirs(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize("beside", ["training_args.bin", "rng_state.pth"])
def test_what_a_trainer_leaves_beside_it_does_not_matter(beside: str, models: Any, tmp_path: Path) -> None:
    model = models("musicgen")
    model.save_pretrained(tmp_path)
    torch.save(Namespace(learning_rate=1e-5), tmp_path / beside)
    torch.testing.assert_close(
        tiny_lms.logits(open_checkpoint(tmp_path).lm()), theirs(model), rtol=0, atol=1e-4
    )
    (tmp_path / "config.json").unlink()
    message = (
        rf"{beside} cannot be read as a PyTorch checkpoint: it holds argparse\.Namespace, which is not read\."
    )
    with pytest.raises(WeightsError, match=message):
        open_checkpoint(tmp_path)


def test_a_language_model_without_its_codec_takes_the_public_one(models: Any, tmp_path: Path) -> None:
    models("musicgen").save_pretrained(tmp_path)

    def strip(state: dict[str, torch.Tensor]) -> None:
        for name in [n for n in state if n.startswith(("audio_encoder.", "text_encoder."))]:
            del state[name]

    rewritten(tmp_path, strip)
    opened = open_checkpoint(tmp_path)
    assert opened.codec() == CodecPointer("encodec_32khz")
    assert opened.text_encoder() is None


LAYER = "decoder.model.decoder.layers.1."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(LAYER + "encoder_attn.k_proj.weight"),
         r"musicgen\).*lacks 1 tensor \(decoder\..*layers\.1\.encoder_attn\.k_proj\.weight\)"),
        (lambda s: s.update({LAYER + "rotary.weight": torch.ones(1)}), r"1 tensor \(.*rotary.*\) that no"),
        (lambda s: s.update({LAYER + "self_attn.v_proj.weight": torch.ones(3, DIM)}), "of several shapes"),
        (lambda s: s.pop("enc_to_dec_proj.weight"), "does not tell its sizes"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(change: Any, message: str, models: Any, tmp_path: Path) -> None:
    models("musicgen").save_pretrained(tmp_path)
    rewritten(tmp_path, change)
    with pytest.raises(WeightsError, match=message):
        open_checkpoint(tmp_path).lm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "type 'llama'; it must be musicgen or musicgen_melody"),
        ({"decoder": {"activation_function": "relu"}}, "activation 'relu'"),
        ({"decoder": {"num_attention_heads": "2"}}, "num_attention_heads '2'; it must be an integer"),
    ],
)
def test_a_configuration_of_something_else_is_refused(
    change: dict[str, Any], message: str, models: Any, tmp_path: Path
) -> None:
    models("musicgen").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(WeightsError, match=message):
        open_checkpoint(tmp_path).config()


@pytest.mark.parametrize(
    ("file", "message"), [("../other.safetensors", "not in its folder"), ("gone.safetensors", "is missing")]
)
def test_an_index_stays_in_its_folder(file: str, message: str, models: Any, tmp_path: Path) -> None:
    models("musicgen").save_pretrained(tmp_path / "own", max_shard_size="200KB")
    index = tmp_path / "own" / "model.safetensors.index.json"
    names = json.loads(index.read_text())
    next(iter((tmp_path / "own").glob("*.safetensors"))).rename(tmp_path / "other.safetensors")
    names["weight_map"] = dict.fromkeys(names["weight_map"], file)
    index.write_text(json.dumps(names))
    with pytest.raises(WeightsError, match=message):
        open_checkpoint(tmp_path / "own")


def test_a_longer_chroma_is_a_longer_window(models: Any, tmp_path: Path) -> None:
    from musicgen_svc.checkpoints.transformers_folder import _duration_s

    for seconds in (10, 20, 30, 60):
        assert _duration_s(1 + 32_000 * seconds // 4096) == seconds
    for frames in range(2, 500):
        assert 1 + int(32_000 * _duration_s(frames)) // 4096 == frames


@pytest.mark.parametrize(
    ("shard", "named"),
    [
        ("50GB", "model.safetensors"),
        ("50GB", "config.json"),
        ("200KB", "model.safetensors.index.json"),
        ("200KB", "model-00001-of-*.safetensors"),
    ],
)
def test_a_file_of_the_folder_means_the_folder(shard: str, named: str, models: Any, tmp_path: Path) -> None:
    models("musicgen").save_pretrained(tmp_path, max_shard_size=shard)
    given, whole = open_checkpoint(next(tmp_path.glob(named))), open_checkpoint(tmp_path)
    assert (given.path, given.files, given.format) == (whole.path, whole.files, whole.format)
    assert isinstance(given.codec(), TransformersPart) and given.text_encoder() is not None
