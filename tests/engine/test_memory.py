"""The bytes that an engine takes are counted as they are, before the model is loaded."""

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from benchmarks.random_models import SIZES, language_model
from musicgen_svc.engine import projections
from musicgen_svc.engine.factory import batch_for
from musicgen_svc.engine.memory import engine_bytes
from musicgen_svc.engine.static import StaticBatch
from musicgen_svc.loading.memory_budget import GB
from musicgen_svc.runtime.slots import GPU_REQUEST_GB

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["text", "melody"])
def test_the_engines_buffers_on_a_gpu_are_counted(kind: str) -> None:
    batch = batch_for(language_model(kind, dim=64, layers=3, heads=4), slots=2, batch_kind="static")
    assert isinstance(batch, StaticBatch)
    state = batch.state
    buffers = [t for t in (state.keys, state.values, state.text_keys, state.text_values) if t is not None]
    counted = engine_bytes(_config(kind), torch.device("cuda"), slots=2, precision="reference")
    assert 2 * counted == sum(buffer.nbytes for buffer in buffers), "half of it in fp16"
    assert engine_bytes(_config(kind), CPU, slots=2, precision="reference") == 0


def test_the_slots_of_a_gpu_count_the_bytes_that_one_more_request_takes() -> None:
    large = SIZES["large"]
    config = _config(large["kind"], dim=large["dim"], layers=large["layers"])
    per_request = engine_bytes(config, torch.device("cuda"), slots=1, precision="reference")
    assert per_request / GB == pytest.approx(GPU_REQUEST_GB, rel=0.02)


@pytest.mark.parametrize("kind", ["text", "melody"])
def test_what_a_faster_precision_packs_is_counted(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = []
    pack = projections._bfloat16
    monkeypatch.setattr(
        projections, "_bfloat16", lambda weight: packed.append(2 * weight.numel()) or pack(weight)
    )
    batch_for(language_model(kind, dim=64, layers=3, heads=4), precision="bfloat16")
    counted = engine_bytes(_config(kind), CPU, slots=1, precision="bfloat16")
    assert counted == -sum(packed), "two bytes of four are saved"


def _config(kind: str, dim: int = 64, layers: int = 3) -> DictConfig:
    lm = {"num_layers": layers, "dim": dim, "hidden_scale": 4, "n_q": 4, "card": 2048}
    cross = ["description"] if kind == "text" else []
    return OmegaConf.create({"transformer_lm": lm, "fuser": {"cross": cross}})
