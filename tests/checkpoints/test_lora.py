"""PEFT's adapters: our model on the merged weights computes what PEFT's model does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny_lms
import torch
from transformers_models import model_of, theirs

from musicgen_svc.checkpoints import OpenedCheckpoint, open_checkpoint
from musicgen_svc.errors import WeightsError
from musicgen_svc.loading.file_hashes import Hashes

# PEFT reads a property of transformers' models by its older name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

ATTENTION = ["q_proj", "k_proj", "v_proj", "out_proj"]


def adapted(kind: str = "musicgen", adapter: Any = None, **settings: Any) -> Any:
    """Makes PEFT's model of a new base. Noise is added to all trainable weights, as if it were trained."""
    base = model_of(kind)
    base.name_or_path = "facebook/musicgen-tiny"
    model = peft.get_peft_model(base, adapter or peft.LoraConfig(lora_alpha=12, r=4, **settings)).eval()
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saves the base models, which no adapter has changed."""
    folder = tmp_path_factory.mktemp("bases")
    for kind in ("musicgen", "musicgen_melody"):
        model_of(kind).save_pretrained(folder / kind)
    return folder


def save(model: Any, folder: Path) -> None:
    model.save_pretrained(folder, save_embedding_layers=False)


def opened(folder: Path, base: Path, strength: float = 1.0) -> OpenedCheckpoint:
    def resolve(name: str) -> Path:
        assert name == "facebook/musicgen-tiny"
        return base

    return open_checkpoint(folder, base=resolve, strength=strength)


SETTINGS: dict[str, dict[str, Any]] = {
    "one third": {"target_modules": ["v_proj"]},
    "two thirds": {"target_modules": ["q_proj", "v_proj"]},
    "everything": {
        "target_modules": [*ATTENTION, "fc1", "fc2", "enc_to_dec_proj", *(f"lm_heads.{k}" for k in range(4)),
                           *(f"embed_tokens.{k}" for k in range(4))],
    },
    "rank-stabilized": {"target_modules": ["q_proj", "fc1"], "use_rslora": True},
    "patterns": {
        "target_modules": [*ATTENTION, "fc1"],
        "rank_pattern": {"k_proj": 2, r"layers\.1\.fc1": 8},
        "alpha_pattern": {r"self_attn\.q_proj": 40, "layers.0.encoder_attn.v_proj": 3, r".*\.fc1": 7},
    },
    "patterns, rank-stabilized": {
        "target_modules": ATTENTION, "use_rslora": True, "rank_pattern": {"k_proj": 2},
        "alpha_pattern": {"k_proj": 5},
    },
    "whole modules": {"target_modules": ["q_proj"], "modules_to_save": ["enc_to_dec_proj", "fc1"]},
    "biases": {"target_modules": ["k_proj", "enc_to_dec_proj"], "bias": "lora_only"},
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_logits_are_pefts(name: str, bases: Path, tmp_path: Path) -> None:
    model = adapted(**SETTINGS[name])
    save(model, tmp_path)
    adapter = opened(tmp_path, bases / "musicgen")
    assert adapter.format == "LoRA adapter"
    expected = theirs(model.merge_and_unload())
    plain = tiny_lms.logits(open_checkpoint(bases / "musicgen").lm())
    assert (expected - plain).abs().max() > 0.05
    torch.testing.assert_close(tiny_lms.logits(adapter.lm()), expected, rtol=0, atol=1e-4)


def test_a_melody_models_adapter_reaches_its_projections(bases: Path, tmp_path: Path) -> None:
    model = adapted(
        "musicgen_melody", target_modules=["q_proj", "v_proj", "enc_to_dec_proj", "audio_enc_to_dec_proj"]
    )
    save(model, tmp_path)
    adapter = opened(tmp_path, bases / "musicgen_melody")
    torch.testing.assert_close(
        tiny_lms.logits(adapter.lm()), theirs(model.merge_and_unload()), rtol=0, atol=1e-4
    )


def test_an_adapter_of_audiocrafts_own_model_loads(tmp_path: Path) -> None:
    config = tiny_lms.config_of("small")
    state = tiny_lms.lm_of(config)
    torch.save({"xp.cfg": tiny_lms.dict_config(config), "model": state}, tmp_path / "base")
    lm = tiny_lms.build(open_checkpoint(tmp_path / "base").lm())
    settings = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["linear1", "linear2", "linears.0"])
    model = peft.get_peft_model(lm, settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.peft_config["default"].base_model_name_or_path = "facebook/musicgen-tiny"
    save(model, tmp_path / "adapter")
    merged = {name: tensor.clone() for name, tensor in model.merge_and_unload().state_dict().items()}
    loaded = opened(tmp_path / "adapter", tmp_path / "base").lm()
    expected = tiny_lms.reference_logits(config, merged)
    torch.testing.assert_close(tiny_lms.logits(loaded), expected, rtol=0, atol=1e-4)
    assert not torch.equal(loaded.state["linears.0.weight"], state["linears.0.weight"])


@pytest.mark.parametrize("name", ["two thirds", "whole modules"])
def test_strength_goes_from_the_base_to_what_was_trained_and_beyond(
    name: str, bases: Path, tmp_path: Path
) -> None:
    save(adapted(**SETTINGS[name]), tmp_path)
    base = open_checkpoint(bases / "musicgen").lm().state
    full = opened(tmp_path, bases / "musicgen").lm().state
    for strength in (0.0, 0.5, 1.5):
        state = opened(tmp_path, bases / "musicgen", strength).lm().state
        for key, tensor in state.items():
            torch.testing.assert_close(
                tensor, base[key] + strength * (full[key] - base[key]), rtol=0, atol=1e-5
            )


def test_the_base_is_left_as_it_was_and_gives_all_that_is_no_weight(bases: Path, tmp_path: Path) -> None:
    save(adapted(**SETTINGS["everything"]), tmp_path)
    files = {file: file.read_bytes() for file in (bases / "musicgen").iterdir()}
    adapter, base = opened(tmp_path, bases / "musicgen"), open_checkpoint(bases / "musicgen")
    first = {key: tensor.clone() for key, tensor in adapter.lm().state.items()}
    second = adapter.lm().state
    assert all(torch.equal(first[key], second[key]) for key in first), "merged twice into one tensor"
    assert {file: file.read_bytes() for file in (bases / "musicgen").iterdir()} == files
    assert adapter.config() == base.config()
    assert adapter.codec().state.keys() == base.codec().state.keys()
    assert adapter.text_encoder().state.keys() == base.text_encoder().state.keys()
    assert Hashes().content(adapter.files) != Hashes().content(base.files)


def test_a_half_precision_base_stays_in_half_precision(bases: Path, tmp_path: Path) -> None:
    save(adapted(target_modules=ATTENTION), tmp_path / "adapter")
    model_of("musicgen").half().save_pretrained(tmp_path / "base")
    full = opened(tmp_path / "adapter", bases / "musicgen").lm().state
    half = opened(tmp_path / "adapter", tmp_path / "base").lm().state
    key = "transformer.layers.0.self_attn.in_proj_weight"
    assert half[key].dtype == torch.float16
    torch.testing.assert_close(half[key].float(), full[key], rtol=2e-3, atol=1e-4)


def test_an_adapter_in_a_torch_save_file_loads(bases: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = adapted(target_modules=ATTENTION)
    save(model, tmp_path)
    torch.save(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    expected = theirs(model.merge_and_unload())
    torch.testing.assert_close(
        tiny_lms.logits(opened(tmp_path, bases / "musicgen").lm()), expected, rtol=0, atol=1e-4
    )


# --- what does not fit ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (peft.LoraConfig(target_modules=["q_proj"], use_dora=True), "uses use_dora, which is more than LoRA"),
        (peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"), "init_lora_weights 'pissa'"),
        (peft.LoHaConfig(target_modules=["q_proj"]), "type 'LOHA'; it must be 'LORA'"),
        (
            peft.LoraConfig(target_modules=["wi"]),
            r"changes 1 tensor \(text_encoder\..* that the base does not",
        ),
        (peft.LoraConfig(target_modules=["q_proj"], bias="all"), r"\d+ tensors \(audio_encoder\."),
    ],
)
def test_more_than_lora_is_refused(adapter: Any, message: str, bases: Path, tmp_path: Path) -> None:
    save(adapted(adapter=adapter), tmp_path)
    with pytest.raises(WeightsError, match=message):
        opened(tmp_path, bases / "musicgen").lm()


def test_an_adapter_of_another_size_or_architecture_is_refused(bases: Path, tmp_path: Path) -> None:
    save(adapted(target_modules=["encoder_attn.q_proj", "fc1"]), tmp_path / "adapter")
    model_of("musicgen", dim=192).save_pretrained(tmp_path / "wide")
    with pytest.raises(
        WeightsError, match=r"changes 4 tensors \(.*q_proj.* of another shape than the base's"
    ):
        opened(tmp_path / "adapter", tmp_path / "wide").lm()
    with pytest.raises(
        WeightsError,
        match=r"changes 2 tensors \(.*encoder_attn\.q_proj\.weight.* that the base does not have",
    ):
        opened(tmp_path / "adapter", bases / "musicgen_melody").lm()


def edited(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model_name_or_path": None}, "does not name its base"),
        ({"lora_alpha": "many"}, "lora_alpha 'many'"),
        ({"lora_alpha": 10**400}, "lora_alpha an integer of more than 40 digits; it must be a number"),
        ({"lora_alpha": True}, "lora_alpha True; it must be a number"),
        ({"alpha_pattern": {"q_proj": "many"}}, "lora_alpha 'many' in alpha_pattern"),
        ({"alpha_pattern": {"q_proj": 10**400}}, "in alpha_pattern; it must be a number"),
        ({"alpha_pattern": ["q_proj"]}, "it must be a mapping"),
        ({"alpha_pattern": {"(a+)+": 3}}, "a regular expression, which is not read: write out the names"),
        ({"alpha_pattern": {"a?" * 40 + "a" * 40: 3}}, "a regular expression"),
        ({"alpha_pattern": {".*.*.*.*X": 3}}, "a regular expression"),
        ({"alpha_pattern": {"a{4294967296}": 3}}, "a regular expression"),
        ({"alpha_pattern": {"(" * 10_000 + ")" * 10_000: 3}}, "a regular expression"),
        ({"alpha_pattern": {"[": 3}}, "a regular expression"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    changes: dict[str, Any], message: str, bases: Path, tmp_path: Path
) -> None:
    save(adapted(target_modules=["q_proj"]), tmp_path)
    edited(tmp_path, **changes)
    with pytest.raises(WeightsError, match=message):
        opened(tmp_path, bases / "musicgen").lm()


def drop(part: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(state: dict[str, torch.Tensor]) -> None:
        del state[next(name for name in state if part in name)]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("lora_A"), "only one of the factors"),
        (
            lambda state: state.update({next(n for n in state if "lora_A" in n): torch.ones(3, 128)}),
            "go together",
        ),
    ],
)
def test_factors_that_do_not_match_are_refused(
    change: Any, message: str, bases: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    save(adapted(target_modules=["q_proj"]), tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    change(state)
    save_file(state, tmp_path / "adapter_model.safetensors")
    with pytest.raises(WeightsError, match=message):
        opened(tmp_path, bases / "musicgen").lm()


def test_a_base_must_be_known_and_be_a_model(bases: Path, tmp_path: Path) -> None:
    save(adapted(target_modules=["q_proj"]), tmp_path)
    with pytest.raises(WeightsError, match="'facebook/musicgen-tiny', and no base models are known"):
        open_checkpoint(tmp_path)
    with pytest.raises(WeightsError, match="which is an adapter itself"):
        opened(tmp_path, tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"without its weights, adapter_model\.safetensors"):
        opened(tmp_path, bases / "musicgen")


@pytest.mark.parametrize("named", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_of_an_adapter_means_the_adapter(named: str, bases: Path, tmp_path: Path) -> None:
    save(adapted(target_modules=["q_proj"]), tmp_path)
    base = bases / "musicgen"
    given, whole = opened(tmp_path / named, base), opened(tmp_path, base)
    assert (given.path, given.files, given.format) == (whole.path, whole.files, whole.format)
