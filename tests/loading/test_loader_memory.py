"""The loader keeps models within a memory budget: which are in memory, and when."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from musicgen_svc.checkpoints import Checkpoint, open_checkpoint
from musicgen_svc.engine.engine import Engine
from musicgen_svc.errors import InputError, WeightsError
from musicgen_svc.loading.cache import Entry
from musicgen_svc.loading.loader import Loader
from musicgen_svc.loading.memory_budget import GB
from musicgen_svc.loading.model import Model
from musicgen_svc.models.encodec_builder import build_codec, read_encodec
from musicgen_svc.models.language_model import LazyLM
from musicgen_svc.settings import Settings
from musicgen_svc.weights.catalog import read_catalog
from musicgen_svc.weights.paths import Weights

CPU = torch.device("cpu")
MakeLoader = Callable[..., Loader]


@pytest.fixture
def loader(weights: Path) -> MakeLoader:
    """Returns a function that makes a loader; `finetuned` is the stereo model, or the one given."""

    def make(budget: int | None = None, given: str = "stereo") -> Loader:
        """`budget`: in bytes; None: the default."""
        settings = Settings() if budget is None else Settings(memory_budget_gb=budget / GB)
        return Loader(Weights.at(weights, read_catalog(), str(weights / given)), CPU, settings)

    return make


@pytest.fixture
def sizes(loader: MakeLoader) -> dict[str, int]:
    """Bytes of each model with its parts, of `demucs`, `mbd` and `codec`, and of what two models share."""
    found = {}
    for name in ("small", "melody", "finetuned"):
        models = loader()
        model = models.model(name)
        found[name] = models._cache.used
        if name == "small":
            models.diffusion(model.path, model.codec)
            found["mbd"] = models._cache.used - found[name]
        if name == "melody":
            model.conditioner.melody(torch.zeros(1, 32_000))
            found["demucs"] = models._cache.used - found[name]
    models = loader()
    models.codec()
    found["codec"] = models._cache.used
    models.model("small"), models.model("melody")
    found["shared"] = found["small"] + found["melody"] - models._cache.used
    return found


def modules_bytes(model: Model) -> int:
    """Returns the bytes of all weights of a model; weights that share memory are counted once."""
    lm = model.engine.decoder.lm
    text = model.conditioner.conditioners["description"]
    modules = [lm, model.codec._mono, text._t5[0]]  # type: ignore[union-attr,index]
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]  # type: ignore[union-attr,operator]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


@pytest.mark.parametrize("name", ["small", "finetuned", "melody"])
@pytest.mark.parametrize("given", ["stereo", "hf-codec"])
def test_a_models_size_is_known_before_it_is_loaded(
    loader: MakeLoader, name: str, given: str, all_weights_kept: None
) -> None:
    """The conditioners' projections and some constants are not counted."""
    models = loader(given=given)
    model = models.model(name)
    known = sum(t.nbytes for t in (*model.conditioner.parameters(), *model.conditioner.buffers()))
    assert 0 <= modules_bytes(model) - models._cache.used - known < 1000


def test_the_least_recently_used_model_is_evicted_before_a_new_one_is_built(
    loader: MakeLoader, sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loads A, B, A and C with room for two of them."""
    models = loader(sizes["small"] + sizes["finetuned"] - sizes["shared"])
    engines: dict[str, weakref.ref[Engine]] = {}
    alive_at_build: list[set[str]] = []
    build = Entry.build

    def alive() -> set[str]:
        return {name for name, engine in engines.items() if engine() is not None}

    def watched(entry: Entry[Any]) -> None:
        if entry.role == "model":
            alive_at_build.append(alive())
        build(entry)

    monkeypatch.setattr(Entry, "build", watched)
    for name in ("small", "melody", "small", "finetuned"):
        engines[name] = weakref.ref(models.model(name).engine)
    assert alive_at_build == [set(), {"small"}, {"small"}], (
        "the second A was in memory, and B was evicted before C was built"
    )
    assert alive() == {"small", "finetuned"}
    assert models._cache.used <= models._cache._budget.budget


def test_a_part_is_evicted_when_no_model_in_memory_uses_it_and_its_room_is_needed(loader: MakeLoader) -> None:
    hf = loader(given="hf-codec")
    hf.start()
    alone = hf._cache.used
    models = loader(alone, "hf-codec")
    codec = weakref.ref(models.model("small").codec._mono)
    text = weakref.ref(models.model("small").conditioner.conditioners["description"]._t5[0])  # type: ignore[index,union-attr,arg-type]
    models.model("finetuned")
    assert models._cache.used == alone
    assert codec() is None, "its codec is another one"
    assert text() is not None, "T5 is the same"


def test_a_model_larger_than_the_budget_is_refused_before_anything_is_loaded(
    loader: MakeLoader, sizes: dict[str, int]
) -> None:
    models = loader(sizes["finetuned"] - 1)
    with pytest.raises(
        WeightsError,
        match=r"model_version 'finetuned' with its codec and T5 takes .* GB .* the budget is .* GB: "
        "take a smaller model, or raise MUSICGEN_MEMORY_BUDGET_GB",
    ):
        models.start()
    assert models._cache.used == 0
    models = loader(sizes["finetuned"])
    assert models.start().name == "finetuned"


def test_a_model_that_is_refused_evicts_nothing(loader: MakeLoader, sizes: dict[str, int]) -> None:
    models = loader(sizes["small"] - 1)
    melody = models.model("melody")
    with pytest.raises(WeightsError, match="'small' with its codec and T5 takes"):
        models.model("small")
    assert models.model("melody") is melody
    with pytest.raises(WeightsError, match="'melody' with its codec, T5 and Demucs takes"):
        loader(sizes["melody"] + sizes["demucs"] - 1).model("melody")


def test_what_is_loaded_for_a_request_does_not_evict_its_model(
    loader: MakeLoader, sizes: dict[str, int]
) -> None:
    models = loader(sizes["small"])
    other = weakref.ref(models.model("small").engine)
    melody = models.model("melody")
    melody.conditioner.melody(torch.zeros(1, 32_000))
    assert models.model("melody") is melody and other() is None
    models = loader(sizes["small"] + sizes["mbd"] - 1)
    small = models.model("small")
    with pytest.raises(
        InputError,
        match=r"multi_band_diffusion is true, but MultiBand Diffusion together with the model .* takes",
    ):
        models.diffusion(small.path, small.codec)
    assert models.model("small") is small


def test_encode_decode_evicts_a_model_if_there_is_no_other_room(
    loader: MakeLoader, sizes: dict[str, int]
) -> None:
    models = loader(sizes["small"] + sizes["mbd"] - 1)
    engine = weakref.ref(models.model("small").engine)
    checkpoint, codec = models.codec()
    assert engine() is not None, "the codec is shared"
    models.diffusion(checkpoint, codec)
    assert engine() is None
    assert models.codec()[1]._mono is codec._mono, "it is in use, so that it is kept"


def test_diffusion_does_not_keep_a_codec_in_memory(loader: MakeLoader, sizes: dict[str, int]) -> None:
    """The decoder holds a codec, which may belong to a model that is evicted later."""
    models = loader(sizes["small"] + sizes["mbd"], "hf-codec")
    small = models.model("small")
    codec = weakref.ref(small.codec._mono)
    first, second = (models.diffusion(small.path, small.codec) for _ in range(2))
    assert first._bands is second._bands
    del small, first, second
    models.model("finetuned")
    gc.collect()
    assert codec() is None


def test_a_models_layers_are_in_memory_only_while_they_are_packed(
    loader: MakeLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each thread has one layer in memory, whatever the size of the model."""
    counts: list[int] = []
    load = LazyLM.load

    def in_memory(lm: Any) -> list[torch.nn.Module]:
        parts = (*lm.transformer.layers, lm.linears)
        return [part for part in parts if not all(weight.is_meta for weight in part.parameters())]

    def counted(lazy: LazyLM, part: torch.nn.Module) -> None:
        load(lazy, part)
        counts.append(len(in_memory(lazy._lm)))

    monkeypatch.setattr(LazyLM, "load", counted)
    model = loader().model("small")
    lm = model.engine.decoder.lm
    assert len(counts) == len(lm.transformer.layers) + 1 and max(counts) <= torch.get_num_threads()
    assert in_memory(lm) == [] and not any(emb.weight.is_meta for emb in lm.emb)


@pytest.mark.parametrize("library", ["audiocraft", "transformers"])
def test_a_codecs_weights_are_the_files_own_pages(weights: Path, library: str) -> None:
    if library == "audiocraft":
        source = open_checkpoint(weights / "small").codec()
        assert isinstance(source, Checkpoint)
        module: Any = build_codec(source, CPU)
    else:
        source = read_encodec(weights / "encodec_32khz")
        module = build_codec(source, CPU).model
    own = module.state_dict()
    assert own and all(tensor.data_ptr() == source.state[name].data_ptr() for name, tensor in own.items())
    assert not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
