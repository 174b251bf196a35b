"""The loader turns names into models, and says in one sentence what is missing or wrong."""

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from musicgen_svc.checkpoints import open_checkpoint
from musicgen_svc.errors import InputError, WeightsError
from musicgen_svc.loading.loader import Loader
from musicgen_svc.loading.model import Model
from musicgen_svc.models.conditioners import TEXT, TextConditioner
from musicgen_svc.settings import Settings
from musicgen_svc.weights.catalog import read_catalog
from musicgen_svc.weights.lock_file import sha256_of
from musicgen_svc.weights.paths import DEMO, Weights

CPU = torch.device("cpu")


def loader(folder: Path, given: Path | None = None) -> Loader:
    """Returns a loader for a folder of weights; `given`: the path in COG_WEIGHTS."""
    return Loader(Weights.at(folder, read_catalog(), str(given) if given else None), CPU, Settings())


@pytest.fixture
def own(weights: Path, tmp_path: Path) -> Path:
    """A fine-tune in a folder outside the weights; nothing else is in its parent folder."""
    return Path(shutil.copytree(weights / "small", tmp_path / "elsewhere" / "own"))


def test_start_loads_the_finetune_or_the_first_base_model(weights: Path, own: Path) -> None:
    assert loader(weights, own).start().name == "finetuned"
    assert loader(weights).start().name == "small"


def test_the_demo_model_is_found_wherever_the_weights_are(weights: Path, tmp_path: Path) -> None:
    assert loader(tmp_path).start().path == DEMO
    beside = loader(weights)
    assert beside.start().name == "small" and beside.model("finetuned").path == DEMO
    shutil.copytree(weights / "small", tmp_path / "finetuned")
    assert Weights.at(tmp_path, read_catalog(), None).finetuned == tmp_path / "finetuned"


def test_the_precision_of_the_settings_is_the_engines(weights: Path) -> None:
    found = Weights.at(weights, read_catalog(), None)
    chosen = Loader(found, CPU, Settings(precision="bfloat16")).model("small")
    assert (chosen.engine.precision, loader(weights).model("small").engine.precision) == (
        "bfloat16",
        "reference",
    )


def test_start_without_any_weights_says_where_to_put_them(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"finetuned.*COG_WEIGHTS.*no model is present"):
        Loader(Weights.at(tmp_path, read_catalog(), None, demo=tmp_path / "none"), CPU, Settings()).start()


def test_an_absent_model_is_named_with_the_command_that_gets_it(weights: Path) -> None:
    with pytest.raises(WeightsError, match=r"'large'.*scripts/download_weights large.*small, melody"):
        loader(weights).model("large")


def test_a_given_checkpoint_that_does_not_exist_is_refused(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="COG_WEIGHTS is"):
        loader(weights, tmp_path / "nothing")


def test_a_failed_load_leaves_the_loader_usable(weights: Path) -> None:
    models = loader(weights)
    models.model("small")
    with pytest.raises(WeightsError):
        models.model("medium")
    assert models.model("small").name == "small"


def test_a_checkpoints_own_parts_are_used_before_the_common_ones(
    weights: Path, own: Path, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match=r"own needs t5-small, .*download_weights t5-small"):
        loader(tmp_path, own).start()
    shutil.copytree(weights / "t5-small", own / "t5-small")
    shutil.copytree(weights / "t5-small", tmp_path / "t5-small")
    found = Weights.at(tmp_path, read_catalog(), str(own))
    assert found.part_path("t5-small", own) == own / "t5-small"
    assert loader(tmp_path, own).start().name == "finetuned"


@pytest.mark.parametrize("by", ["rename", "copy"])
def test_a_checkpoint_whose_file_is_replaced_is_loaded_again(by: str, weights: Path, own: Path) -> None:
    """On a CPU the weights are mapped from the file: without a reload the model would have the new weights
    and the old hash.
    """
    models, file = loader(weights, own), own / "state_dict.bin"
    first = models.start()
    assert models.model("finetuned") is first
    first_hash = first.content_hash  # computed in the background, from the file that is there at that time
    package = torch.load(file, weights_only=True)
    package["best_state"]["out_norm.weight"] *= 2
    torch.save(package, own / "newer")
    if by == "rename":
        (own / "newer").replace(file)
    else:
        content = (own / "newer").read_bytes()
        (own / "newer").unlink()
        file.write_bytes(content[: len(content) // 2])
        with pytest.raises(WeightsError, match=r"own/state_dict\.bin cannot be read as a PyTorch checkpoint"):
            models.model("finetuned")
        file.write_bytes(content)
    second = models.model("finetuned")
    assert second is not first and models.model("finetuned") is second
    assert second.content_hash == sha256_of(file) != first_hash
    assert second.codec._mono is first.codec._mono, (
        "the codec's file is unchanged, and must not be loaded again"
    )


def test_a_model_whose_part_is_replaced_is_loaded_again_and_other_models_files_do_not_matter(
    weights: Path, own: Path, tmp_path: Path
) -> None:
    """Models with equal codec files share one codec, which was loaded from the files of the first model."""
    shutil.copytree(weights / "t5-small", tmp_path / "weights" / "t5-small")
    base = Path(shutil.copytree(weights / "small", tmp_path / "weights" / "small"))
    models = loader(tmp_path / "weights", own)
    codec = models.model("small").codec._mono
    finetuned = models.model("finetuned")
    assert finetuned.codec._mono is codec
    shutil.rmtree(base)
    assert models.model("finetuned") is finetuned
    (own / "compression_state_dict.bin").touch()
    reloaded = models.model("finetuned")
    assert reloaded is not finetuned and reloaded.codec._mono is codec, "its content is the same"
    assert models.model("finetuned") is reloaded


def test_an_archive_uses_the_parts_beside_it_and_is_reloaded_when_it_is_replaced(
    weights: Path, own: Path, tmp_path: Path
) -> None:
    shutil.copytree(weights / "t5-small", own.parent / "t5-small")
    archive = Path(shutil.make_archive(str(own), "tar", own))
    models = loader(tmp_path / "weights", archive)
    first = models.start()
    assert first.format == loader(weights, own).start().format
    (own / "README.md").write_text("another version")
    shutil.make_archive(str(own), "tar", own)
    second = models.model("finetuned")
    assert second is not first and second.path != first.path


def test_only_models_with_a_melody_conditioner_take_melodies(weights: Path) -> None:
    models = loader(weights, weights / "stereo")
    assert models.takes_melody("melody")
    assert not models.takes_melody("small") and not models.takes_melody("finetuned")
    assert models.melody_models() == ["melody"]
    assert loader(weights, weights / "melody").melody_models() == ["melody", "finetuned"]


def test_the_codec_of_encode_decode_does_not_depend_on_what_ran_before(weights: Path) -> None:
    models = loader(weights, weights / "stereo")
    before = models.codec()[1].fingerprint()
    models.model("melody")
    folder, codec = models.codec()
    assert folder == weights / "small" and codec.fingerprint() == before and codec.channels == 1


def test_diffusion_accepts_the_codec_that_it_was_trained_for_in_any_folder(weights: Path, own: Path) -> None:
    models = loader(weights, own)
    model = models.start()
    decoder = models.diffusion(model.path, model.codec)
    assert models.diffusion(model.path, model.codec)._bands is decoder._bands, "loaded once"


def test_diffusion_refuses_another_codec(weights: Path, own: Path) -> None:
    package = torch.load(own / "compression_state_dict.bin", weights_only=True)
    codebook = next(name for name in package["best_state"] if name.endswith("embed"))
    package["best_state"][codebook] += 0.01
    torch.save(package, own / "compression_state_dict.bin")
    models = loader(weights, own)
    model = models.start()
    with pytest.raises(InputError, match=r"multi_band_diffusion is true, but own has a codec of its own"):
        models.diffusion(model.path, model.codec)
    shutil.copytree(weights / "multiband-diffusion", own / "multiband-diffusion")
    models.diffusion(model.path, model.codec)  # the checkpoint has its own diffusion weights


def test_weights_that_do_not_fit_are_named(weights: Path, own: Path) -> None:
    package = torch.load(own / "state_dict.bin", weights_only=True)
    state = package["best_state"]
    state["extra.weight"] = state.pop("out_norm.weight")
    torch.save(package, own / "state_dict.bin")
    with pytest.raises(
        WeightsError,
        match=r"it lacks 1 tensor \(out_norm.weight\); it has 1 tensor \(extra.weight\) too many",
    ):
        loader(weights, own).start()
    state["out_norm.weight"] = torch.zeros(3)
    del state["extra.weight"]
    torch.save(package, own / "state_dict.bin")
    with pytest.raises(
        WeightsError,
        match=r"it has 1 tensor \(out_norm.weight is \[3\] where \[64\] belongs\) of another shape",
    ):
        loader(weights, own).start()


def test_a_pickle_that_would_run_code_is_not_run(weights: Path, own: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "ran",))

    for name in ("state_dict.bin", "compression_state_dict.bin"):
        checkpoint = Path(shutil.copytree(own, tmp_path / name))
        torch.save({"best_state": {}, "xp.cfg": Evil()}, checkpoint / name)
        with pytest.raises(WeightsError, match=name):
            loader(weights, checkpoint).start()
    assert not (tmp_path / "ran").exists()


def t5_of(model: Model) -> torch.nn.Module:
    """Returns the text encoder of a model."""
    conditioner = model.conditioner.conditioners[TEXT]
    assert isinstance(conditioner, TextConditioner)
    return conditioner._t5[0]


def test_models_share_parts_with_equal_files_in_any_folder(weights: Path, own: Path) -> None:
    shutil.copytree(weights / "t5-small", own / "t5-small")
    models = loader(weights, own)
    small, melody, finetuned = (models.model(name) for name in ("small", "melody", "finetuned"))
    assert small.codec._mono is melody.codec._mono is finetuned.codec._mono
    assert t5_of(small) is t5_of(melody) is t5_of(finetuned)
    assert models.codec()[1]._mono is small.codec._mono


def test_a_checkpoints_own_t5_is_not_used_for_another_model(weights: Path, own: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(weights / "t5-small", own / "t5-small")
    file = own / "t5-small" / "model.safetensors"
    state = load_file(file)
    state["encoder.final_layer_norm.weight"] += 1
    save_file(state, file, {"format": "pt"})
    models = loader(weights, own)
    finetuned, melody = models.model("finetuned"), models.model("melody")
    assert t5_of(finetuned) is not t5_of(melody)
    for prompt in ("rock", "slow jazz"):
        common = loader(weights).model("melody").conditioner.text(prompt)[TEXT][0]
        assert torch.equal(melody.conditioner.text(prompt)[TEXT][0], common)
    changed, before = (t5_of(m).encoder["final_layer_norm"].weight for m in (finetuned, melody))
    assert torch.equal(changed, before + 1)


def test_a_part_with_a_missing_file_is_named(weights: Path, own: Path) -> None:
    shutil.copytree(weights / "t5-small", own / "t5-small")
    (own / "t5-small" / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"own/t5-small/config.json is missing"):
        loader(weights, own).start()


def test_models_with_different_codecs_do_not_share_them(weights: Path) -> None:
    models = loader(weights, weights / "hf-codec")
    assert models.model("small").codec.cardinality == 400
    assert models.model("finetuned").codec.cardinality == 512
    assert models.model("small").codec.cardinality == 400


def test_loading_leaves_the_global_generators_as_they_were(weights: Path) -> None:
    models = loader(weights, weights / "hf-codec")
    before = random.getstate(), torch.get_rng_state()
    model = models.model("finetuned")
    models.codec()
    small = models.model("small")
    models.diffusion(small.path, small.codec)
    models.model("melody").conditioner.melody(torch.zeros(1, 32_000))
    model.conditioner.text("rock")
    assert random.getstate() != before[0], "Demucs draws its shift"
    assert torch.equal(torch.get_rng_state(), before[1])


def test_a_model_is_opened_once_for_all_questions_of_a_request(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []

    def counted(path: Path, **options: Any) -> Any:
        opened.append(path)
        return open_checkpoint(path, **options)

    monkeypatch.setattr("musicgen_svc.loading.opener.open_checkpoint", counted)
    models = loader(weights)
    for _ in range(2):
        assert models.takes_melody("melody")
        models.model("melody")
    assert opened == [weights / "melody"]


def test_a_checkpoint_given_as_a_file_uses_everything_in_its_folder(weights: Path, tmp_path: Path) -> None:
    """That is its codec, which has the shape of the public one, its T5, and its diffusion weights."""
    folder = Path(shutil.copytree(weights / "small", tmp_path / "mine" / "own"))
    for part in ("t5-small", "multiband-diffusion"):
        shutil.copytree(weights / part, folder / part)
    package = torch.load(folder / "compression_state_dict.bin", weights_only=True)
    codebook = next(name for name in package["best_state"] if name.endswith("embed"))
    package["best_state"][codebook] += 0.01
    torch.save(package, folder / "compression_state_dict.bin")
    by_file = loader(tmp_path / "none", folder / "state_dict.bin")
    named, whole = by_file.start(), loader(tmp_path / "none", folder).start()
    assert (named.path, named.format, named.content_hash) == (whole.path, whole.format, whole.content_hash)
    assert named.codec.fingerprint() == whole.codec.fingerprint()
    assert named.codec.fingerprint() != loader(weights).model("small").codec.fingerprint()
    by_file.diffusion(named.path, named.codec)  # the checkpoint has its own diffusion weights
