"""The formats of torch.save files. Each is written by its own tool, and gives the logits of its model."""

from pathlib import Path
from typing import Any

import pytest
import tiny_lms
import torch
from omegaconf import OmegaConf

from musicgen_svc.checkpoints import Checkpoint, CodecPointer, open_checkpoint
from musicgen_svc.checkpoints.unpickle import _ALLOWED_TYPES
from musicgen_svc.errors import WeightsError

NAMES = ["small", "melody", "stereo"]


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[tiny_lms.Package, dict[str, torch.Tensor], torch.Tensor]]:
    """Makes a model of each architecture: its configuration, weights and logits."""
    made = {}
    for name in NAMES:
        config = tiny_lms.config_of(name)
        state = tiny_lms.lm_of(config)
        made[name] = config, state, tiny_lms.reference_logits(config, state)
    return made


def dora(config: tiny_lms.Package, state: Any, best: Any = None, sharded: Any = None) -> tiny_lms.Package:
    """Returns the dictionary that audiocraft's solver passes to torch.save."""
    return {
        "xp.cfg": tiny_lms.dict_config(config),
        "xp.sig": "9f1c2a3b",
        "history": [{"train": {"ce": 3.1, "ppl": 22.0}, "valid": {"ce": 3.2}}],
        "best_state": {"model": best} if best else {},
        "fsdp_best_state": {"model": sharded} if sharded else {},
        "model": state,
        "optimizer": torch.optim.AdamW([torch.zeros(3, requires_grad=True)]).state_dict(),
        "scheduler": {"last_epoch": 4},
        "ema": None,
    }


def lightning(state: dict[str, torch.Tensor]) -> tiny_lms.Package:
    """Returns the dictionary that Lightning's trainer passes to torch.save."""
    return {
        "epoch": 3,
        "global_step": 400,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {f"model.{name}": tensor for name, tensor in state.items()}
        | {"loss.weight": torch.ones(4)},
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"current": {"ready": 4}}}},
        "callbacks": {
            "ModelCheckpoint": {"best_model_score": torch.tensor(3.2), "best_model_path": "a.ckpt"}
        },
        "optimizer_states": [],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 1e-4},
    }


def export(config: tiny_lms.Package, state: Any, folder: Path) -> Path:
    """Exports a training with audiocraft's own function. The codec's file only names a public codec."""
    from audiocraft.utils.export import export_lm, export_pretrained_compression_model

    folder.mkdir()
    torch.save(dora(config, state, state), folder.with_suffix(".th"))
    with torch.serialization.safe_globals(_ALLOWED_TYPES):
        export_lm(folder.with_suffix(".th"), folder / "state_dict.bin")
    export_pretrained_compression_model("facebook/encodec_32khz", folder / "compression_state_dict.bin")
    return folder


def written(kind: str, config: tiny_lms.Package, state: dict[str, torch.Tensor], folder: Path) -> Path:
    """Writes a checkpoint in a format, into a file whose name does not tell the format."""
    if kind == "audiocraft export":
        return export(config, state, folder / "export")
    package: Any = {
        "dora checkpoint": lambda: dora(config, {}, state),
        "Cog trainer's file": lambda: {"xp.cfg": tiny_lms.dict_config(config), "model": state},
        "Lightning checkpoint": lambda: lightning(state),
        "bare state dict": lambda: state,
    }[kind]()
    path = folder / "weights.tar"
    torch.save(package, path)
    return path


KINDS = [
    "audiocraft export",
    "dora checkpoint",
    "Cog trainer's file",
    "Lightning checkpoint",
    "bare state dict",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_file_computes_what_its_model_did(kind: str, name: str, models: Any, tmp_path: Path) -> None:
    config, state, expected = models[name]
    opened = open_checkpoint(written(kind, config, state, tmp_path))
    assert opened.format == kind
    assert opened.codec() == CodecPointer("encodec_32khz")
    assert opened.config().transformer_lm.dim == tiny_lms.build(opened.lm()).dim
    torch.testing.assert_close(tiny_lms.logits(opened.lm()), expected, rtol=0, atol=1e-5)


SECTIONS = (
    "transformer_lm", "codebooks_pattern", "classifier_free_guidance", "attribute_dropout", "fuser",
    "dataset", "sample_rate", "channels", "compression_model_checkpoint",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_bare_state_dict_gets_the_released_configuration(name: str, models: Any, tmp_path: Path) -> None:
    """Settings of the training, and values that equal audiocraft's defaults, are not inferred."""
    config, state, _ = models[name]
    inferred = OmegaConf.to_container(
        open_checkpoint(written("bare state dict", config, state, tmp_path)).config()
    )
    released = OmegaConf.to_container(OmegaConf.create(config), resolve=True)
    for section in SECTIONS:
        assert inferred[section] == released[section], section
    assert inferred["interleave_stereo_codebooks"]["use"] is (name == "stereo")
    assert inferred["conditioners"]["description"] == released["conditioners"]["description"]
    if name == "melody":
        chroma, own = (c["conditioners"]["self_wav"]["chroma_stem"] for c in (inferred, released))
        assert {key: chroma[key] for key in ("sample_rate", "n_chroma", "radix2_exp", "argmax")} == {
            key: own[key] for key in ("sample_rate", "n_chroma", "radix2_exp", "argmax")
        }


def test_a_training_gives_its_sharded_best_then_its_best_then_its_last(models: Any, tmp_path: Path) -> None:
    config, state, _ = models["small"]
    last, best, sharded = ({name: t + i for name, t in state.items()} for i in (0, 1, 2))
    path = tmp_path / "checkpoint.th"
    for package, expected in [
        (dora(config, last, best, sharded), sharded),
        (dora(config, last, best), best),
        (dora(config, last), last),
    ]:
        torch.save(package, path)
        assert torch.equal(open_checkpoint(path).lm().state["emb.0.weight"], expected["emb.0.weight"])


def test_tensors_are_mapped_and_the_older_layout_of_torch_save_is_read(models: Any, tmp_path: Path) -> None:
    config, state, expected = models["small"]
    package = {"xp.cfg": tiny_lms.dict_config(config), "model": state}
    for name, zipped in (("new", True), ("old", False)):
        torch.save(package, tmp_path / name, _use_new_zipfile_serialization=zipped)
        lm = open_checkpoint(tmp_path / name).lm()
        torch.testing.assert_close(tiny_lms.logits(lm), expected, rtol=0, atol=1e-5)
    maps = Path("/proc/self/maps")
    lm = open_checkpoint(tmp_path / "new").lm()
    if maps.exists():
        assert str(tmp_path / "new") in maps.read_text()
    del lm


def test_a_model_without_the_efficient_attention_computes_the_same(models: Any, tmp_path: Path) -> None:
    """The names of the tensors in torch's own attention module have one more part."""
    from musicgen_svc.audiocraft_compat import builders

    config, state, expected = models["small"]
    plain = config | {
        "transformer_lm": config["transformer_lm"] | {"memory_efficient": False, "checkpointing": "torch"}
    }
    without = OmegaConf.create(plain | {"device": "cpu", "dtype": "float32", "conditioners": {}})
    lm = builders.get_lm_model(without)
    lm.load_state_dict(
        {n: t for n, t in state.items() if not n.startswith(tiny_lms.PROVIDER)}
    )  # it changes their names
    wrapped = lm.state_dict() | {n: t for n, t in state.items() if n.startswith(tiny_lms.PROVIDER)}
    assert "transformer.layers.0.self_attn.mha.in_proj_weight" in wrapped
    torch.save({"xp.cfg": tiny_lms.dict_config(plain), "model": wrapped}, tmp_path / "x")
    torch.testing.assert_close(
        tiny_lms.logits(open_checkpoint(tmp_path / "x").lm()), expected, rtol=0, atol=1e-5
    )


# --- codecs --------------------------------------------------------------------------------------


def samples(codec: Any) -> torch.Tensor:
    from musicgen_svc.models.encodec import Codec
    from musicgen_svc.models.encodec_builder import build_codec

    assert isinstance(codec, Checkpoint)
    tokens = torch.randint(0, 400, (4, 20), generator=torch.Generator().manual_seed(0))
    return Codec(build_codec(codec, tiny_lms.CPU)).decode(tokens)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("spelling", ["weight_g", "parametrizations"])
def test_a_codec_beside_the_model_loads_in_both_spellings_of_weight_norm(
    spelling: str, models: Any, tmp_path: Path
) -> None:
    from audiocraft.utils.export import export_encodec

    config, state, _ = models["small"]
    folder = export(config, state, tmp_path / "export")
    package = tiny_lms.codec_package()
    expected = samples(Checkpoint(OmegaConf.create(package["xp.cfg"]), package["best_state"]))
    codec = package["best_state"]
    if spelling == "parametrizations":
        ends = {
            "weight_g": "parametrizations.weight.original0",
            "weight_v": "parametrizations.weight.original1",
        }
        codec = {
            next((n.removesuffix(old) + new for old, new in ends.items() if n.endswith(old)), n): t
            for n, t in codec.items()
        }
        assert codec.keys() != package["best_state"].keys()
    training = {"xp.cfg": OmegaConf.create(package["xp.cfg"]), "best_state": {"model": codec}, "model": {}}
    torch.save(training, tmp_path / "codec.th")
    with torch.serialization.safe_globals(_ALLOWED_TYPES):
        export_encodec(tmp_path / "codec.th", folder / "compression_state_dict.bin")
    assert torch.equal(samples(open_checkpoint(folder).codec()), expected)
    # The file of the codec's training may be beside the model instead, under any name.
    (folder / "compression_state_dict.bin").unlink()
    (tmp_path / "codec.th").rename(folder / "anything")
    assert torch.equal(samples(open_checkpoint(folder).codec()), expected)


def test_a_file_that_is_named_itself_does_not_take_an_unrelated_codec(models: Any, tmp_path: Path) -> None:
    config, state, _ = models["small"]
    path = written("Cog trainer's file", config, state, tmp_path)
    torch.save(tiny_lms.codec_package(), tmp_path / "of-another-model.bin")
    assert open_checkpoint(path).codec() == CodecPointer("encodec_32khz")
    assert isinstance(open_checkpoint(tmp_path).codec(), Checkpoint)


def test_a_codec_that_only_its_trainer_has_must_be_beside_the_model(models: Any, tmp_path: Path) -> None:
    config, state, _ = models["small"]
    path = written(
        "Cog trainer's file", config | {"compression_model_checkpoint": "//sig/1a2b3c"}, state, tmp_path
    )
    with pytest.raises(WeightsError, match=r"//sig/1a2b3c.*put the compression_state_dict\.bin"):
        open_checkpoint(path).codec()
    torch.save(tiny_lms.codec_package(), tmp_path / "codec")
    assert isinstance(open_checkpoint(path).codec(), Checkpoint)
    torch.save(tiny_lms.codec_package(), tmp_path / "codec2")
    with pytest.raises(WeightsError, match="2 codecs"):
        open_checkpoint(path).codec()


# --- what does not fit ---------------------------------------------------------------------------


def test_two_models_in_one_folder_are_named(models: Any, tmp_path: Path) -> None:
    _, state, _ = models["small"]
    for name in ("a.pt", "b.pt"):
        torch.save(state, tmp_path / name)
    with pytest.raises(WeightsError, match=r"2 language models \(a\.pt, b\.pt\)"):
        open_checkpoint(tmp_path)


def test_what_is_no_musicgen_is_refused_by_name(tmp_path: Path) -> None:
    torch.save({"weights": torch.ones(2)}, tmp_path / "x")
    with pytest.raises(WeightsError, match="a Lightning checkpoint or a bare state dict"):
        open_checkpoint(tmp_path / "x")
    torch.save(tiny_lms.codec_package(), tmp_path / "x")
    with pytest.raises(WeightsError, match="is a codec"):
        open_checkpoint(tmp_path / "x")
    (tmp_path / "x").unlink()
    with pytest.raises(WeightsError, match="holds no MusicGen"):
        open_checkpoint(tmp_path)
    with pytest.raises(WeightsError, match="is missing"):
        open_checkpoint(tmp_path / "none")


def test_a_model_that_does_not_fit_says_what_and_in_which_format(models: Any, tmp_path: Path) -> None:
    from musicgen_svc.checkpoints.tensor_checks import check_fit

    config, state, _ = models["small"]
    own = tiny_lms.build(
        open_checkpoint(written("Cog trainer's file", config, state, tmp_path)).lm()
    ).state_dict()
    broken = dict(state)
    broken["extra.bias"] = torch.zeros(1)
    broken["out_norm.weight"] = torch.zeros(7)
    for part in ("linear1", "linear2", "norm1", "norm2"):
        del broken[f"transformer.layers.1.{part}.weight"]
    path = written("Cog trainer's file", config, broken, tmp_path)
    lm = open_checkpoint(path).lm()
    with pytest.raises(WeightsError) as caught:
        check_fit(own, lm.state, "language model", lm.origin)
    assert str(caught.value) == (
        f"The Cog trainer's file {path} does not fit its configuration as a language model: it lacks 4 "
        "tensors (transformer.layers.1.linear1.weight, transformer.layers.1.linear2.weight, "
        "transformer.layers.1.norm1.weight, …); it has 1 tensor (extra.bias) too many; it has 1 tensor "
        "(out_norm.weight is [7] where [64] belongs) of another shape; weights and configuration must be "
        "of one model."
    )
    check_fit(own, state, "language model", lm.origin)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.pop("transformer.layers.0.linear1.weight"),
            r"does not tell its sizes, as it lacks 1 tensor",
        ),
        (
            lambda s: s.update({tiny_lms.PROVIDER + "description.output_proj.weight": torch.ones(64, 99)}),
            "99 wide",
        ),
        (lambda s: s.update({"emb.0.weight": torch.ones(5, 63)}), "63 wide"),
    ],
)
def test_a_bare_state_dict_without_its_sizes_says_which(
    change: Any, message: str, models: Any, tmp_path: Path
) -> None:
    config, state, _ = models["small"]
    state = dict(state)
    change(state)
    with pytest.raises(WeightsError, match=message):
        open_checkpoint(written("bare state dict", config, state, tmp_path)).lm()


# --- files of a folder, named themselves ------------------------------------------------------------


def other_codec(path: Path) -> torch.Tensor:
    """Writes a codec that differs from encodec_32khz in one codebook, and returns that codebook."""
    package = tiny_lms.codec_package()
    name = next(name for name in package["best_state"] if name.endswith("embed"))
    package["best_state"][name] = package["best_state"][name] + 1
    torch.save(package, path)
    return torch.Tensor(package["best_state"][name])


@pytest.mark.parametrize("named", ["state_dict.bin", "compression_state_dict.bin"])
def test_a_file_of_an_export_means_the_whole_export(named: str, models: Any, tmp_path: Path) -> None:
    """The configuration of every export names a public codec, but the codec beside it is the one to use."""
    config, state, _ = models["small"]
    folder = export(config, state, tmp_path / "export")
    codebook = other_codec(folder / "compression_state_dict.bin")
    given, whole = open_checkpoint(folder / named), open_checkpoint(folder)
    assert (given.path, given.files, given.format) == (whole.path, whole.files, whole.format)
    codec = given.codec()
    assert isinstance(codec, Checkpoint)
    assert any(
        torch.equal(tensor, codebook) for tensor in codec.state.values() if tensor.ndim == codebook.ndim
    )


def test_a_file_takes_the_codec_of_its_folder_but_not_another_models(models: Any, tmp_path: Path) -> None:
    config, state, _ = models["small"]
    path = written("Cog trainer's file", config, state, tmp_path)
    other_codec(tmp_path / "compression_state_dict.bin")
    assert isinstance(open_checkpoint(path).codec(), Checkpoint)
    export(config, state, tmp_path / "export")
    (tmp_path / "export" / "state_dict.bin").rename(tmp_path / "state_dict.bin")
    assert open_checkpoint(path).codec() == CodecPointer("encodec_32khz"), "the codec is the other model's"
    assert isinstance(open_checkpoint(tmp_path / "state_dict.bin").codec(), Checkpoint)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", ["file", "folder"])
def test_a_bare_state_dict_in_safetensors_is_read_as_one_in_a_torch_file(
    where: str, name: str, models: Any, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    _, state, expected = models[name]
    save_file(state, tmp_path / "lm.safetensors")
    opened = open_checkpoint(tmp_path / "lm.safetensors" if where == "file" else tmp_path)
    assert opened.format == "bare state dict"
    assert opened.files == (tmp_path / "lm.safetensors",)
    torch.testing.assert_close(tiny_lms.logits(opened.lm()), expected, rtol=0, atol=1e-5)
