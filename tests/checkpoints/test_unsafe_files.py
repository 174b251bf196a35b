"""Strangers' files: no entry runs what a pickle says, or reads what a configuration asks for."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_lms
import torch
from omegaconf import DictConfig, OmegaConf

from musicgen_svc.checkpoints import open_checkpoint
from musicgen_svc.checkpoints.configs import lm_config, plain_config
from musicgen_svc.errors import WeightsError

CONFIG = tiny_lms.config_of("small")


class Bomb:
    """Unpickled, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def state() -> dict[str, torch.Tensor]:
    return tiny_lms.lm_of(CONFIG)


def in_file(
    package: Callable[[Bomb], Any], name: str = "weights", **options: Any
) -> Callable[[Path, Bomb], Path]:
    def write(folder: Path, bomb: Bomb) -> Path:
        torch.save(package(bomb), folder / name, **options)
        return folder / name

    return write


def as_folder(write: Callable[[Path, Bomb], Path]) -> Callable[[Path, Bomb], Path]:
    return lambda folder, bomb: write(folder, bomb).parent


def raw(folder: Path, bomb: Bomb) -> Path:
    (folder / "weights").write_bytes(pickle.dumps(bomb))
    return folder / "weights"


def transformers_folder(folder: Path, bomb: Bomb) -> Path:
    (folder / "config.json").write_text(json.dumps({"model_type": "musicgen"}))
    torch.save({"decoder.lm_heads.0.weight": bomb}, folder / "pytorch_model.bin")
    return folder


def transformers_raw(folder: Path, bomb: Bomb) -> Path:
    transformers_folder(folder, bomb)
    (folder / "pytorch_model.bin").unlink()
    (folder / "model.safetensors").write_bytes(pickle.dumps(bomb))
    return folder


def adapter(folder: Path, bomb: Bomb) -> Path:
    settings = {"peft_type": "LORA", "base_model_name_or_path": "base", "lora_alpha": 1}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    torch.save({"base_model.model.x.lora_A.weight": bomb}, folder / "adapter_model.bin")
    return folder


def archived(folder: Path, bomb: Bomb) -> Path:
    import tarfile

    torch.save({"xp.cfg": bomb, "model": state()}, folder / "inner")
    with tarfile.open(folder / "outer", "w") as archive:
        archive.add(folder / "inner", "inner")
    return folder / "outer"


ENTRIES: dict[str, Callable[[Path, Bomb], Path]] = {
    "audiocraft export": as_folder(in_file(lambda b: {"xp.cfg": b, "best_state": state()}, "state_dict.bin")),
    "dora checkpoint": in_file(lambda b: {"xp.cfg": {}, "best_state": {"model": state()}, "history": b}),
    "Cog trainer's file": in_file(lambda b: {"xp.cfg": b, "model": state()}, "trained_model.tar"),
    "Lightning checkpoint": in_file(lambda b: {"state_dict": state(), "hyper_parameters": b}, "last.ckpt"),
    "bare state dict": in_file(lambda b: state() | {"x": b}),
    "older layout": in_file(lambda b: state() | {"x": b}, _use_new_zipfile_serialization=False),
    "pickle": raw,
    "transformers folder": transformers_folder,
    "transformers folder, safetensors in name only": transformers_raw,
    "LoRA adapter": adapter,
    "archive": archived,
}


@pytest.mark.parametrize("name", ENTRIES)
def test_no_entry_runs_what_a_pickle_says(name: str, tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    (tmp_path / "checkpoint").mkdir()
    path = ENTRIES[name](tmp_path / "checkpoint", Bomb(proof))
    with pytest.raises(WeightsError, match=r"cannot be read|no MusicGen"):
        open_checkpoint(path, cache=tmp_path / "cache", base=lambda _: path).lm()
    assert not proof.exists()
    pickle.loads(pickle.dumps(Bomb(proof)))  # noqa: S301
    assert proof.exists()  # the bomb does go off where it may


def test_a_codec_s_file_is_read_as_carefully(tmp_path: Path) -> None:
    torch.save({"xp.cfg": tiny_lms.dict_config(CONFIG), "best_state": state()}, tmp_path / "state_dict.bin")
    torch.save({"pretrained": Bomb(tmp_path / "proof")}, tmp_path / "compression_state_dict.bin")
    opened = open_checkpoint(tmp_path)
    with pytest.raises(WeightsError, match=r"compression_state_dict\.bin cannot be read"):
        opened.codec()
    assert not (tmp_path / "proof").exists()


# --- configurations ------------------------------------------------------------------------------


def test_a_configuration_cannot_read_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    calls = [
        "${oc.env:SECRET}",
        "\\${oc.env:SECRET}",
        "$${oc.env:SECRET}",
        "${a.${oc.env:SECRET}}",
        "${\noc.env:SECRET}",
        "${${name}:SECRET}",
        "${oc.${half}:SECRET}",
    ]
    names = {"name": "oc.env", "half": "env"}
    for make in (lambda c: c, OmegaConf.create, lambda c: OmegaConf.to_yaml(OmegaConf.create(c))):
        for call in calls:
            config = plain_config(make(names | {"a": call, "b": [call], "c": {"d": call}}), "The test")
            assert "hunter2" not in str(OmegaConf.to_container(config, resolve=True))
    for call in (calls[0], *calls[-2:]):
        assert OmegaConf.create(names | {"a": call}).a == "hunter2"  # as it would


def test_a_configuration_keeps_its_references() -> None:
    source = {"rate": 32_000, "a-b": {"c": [7, "${..d}"], "d": "${ rate }"}, "e": "${a-b.c[0]} of ${rate}"}
    config = plain_config(source, "The test")
    assert (config["a-b"].c[1], config["a-b"].d, config.e) == (32_000, 32_000, "7 of 32000")


@pytest.mark.parametrize(
    "make", [lambda c: c, tiny_lms.dict_config, lambda c: OmegaConf.to_yaml(OmegaConf.create(c))]
)
def test_a_configuration_loses_what_only_training_needed_and_stays_open(make: Callable[[Any], Any]) -> None:
    source = tiny_lms.config_of("melody")
    source["conditioners"]["self_wav"]["chroma_stem"]["cache_path"] = "/checkpoint/someone/cache"
    source["conditioners"]["args"] = {"merge_text_conditions_p": 0.25, "drop_desc_p": 0.5, "kept": 1}
    source["dora"] = {"dir": "/tmp/audiocraft_${oc.env:USER}"}
    config = lm_config(make(source), "The test")
    assert "cache_path" not in config.conditioners.self_wav.chroma_stem
    assert dict(config.conditioners.args) == {"kept": 1}
    assert config.conditioners.self_wav.chroma_stem.sample_rate == 32_000  # ${sample_rate}
    config.device = "cpu"
    assert "merge_text_conditions_p" in source["conditioners"]["args"]


def without(section: str) -> dict[str, Any]:
    return {name: value for name, value in CONFIG.items() if name != section}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (CONFIG | {"lm_model": "transformer_lm_magnet"}, "is a 'transformer_lm_magnet'"),
        (without("fuser"), "without fuser"),
        (CONFIG | {"dataset": "nothing"}, "without dataset"),
        (CONFIG | {"dataset": {"segment_duration": "${gone}"}}, "cannot be read"),
        (CONFIG | {"conditioners": {"description": {"t5": {"name": "../.."}}}}, "no name of a model"),
        ("{", "cannot be read"),
        (["a"], "a list, not a mapping"),
        (3, "cannot be read"),
        (DictConfig.__new__(DictConfig), "cannot be read"),
    ],
)
def test_a_configuration_that_is_none_is_refused(source: Any, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        lm_config(source, "The test")


@pytest.mark.parametrize("name", ["..", "a/..", "", "a b", "a\\b"])
def test_a_codec_s_name_is_a_name(name: str, tmp_path: Path) -> None:
    torch.save({"xp.cfg": tiny_lms.dict_config(CONFIG), "best_state": state()}, tmp_path / "state_dict.bin")
    torch.save({"pretrained": name}, tmp_path / "compression_state_dict.bin")
    with pytest.raises(WeightsError, match="no name of a model"):
        open_checkpoint(tmp_path).codec()
