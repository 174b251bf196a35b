"""A chain computes what plain steps compute, with few launches, and refuses a decoder that it cannot compute.

The kernels run on a CPU with Triton's interpreter, and on a GPU if there is one. By default they are compared
in a selection of cases; with `scripts/test --all-kernels tests/engine/test_chain.py` in the full product.
"""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from chain_builds import Recorder, recorded
from chain_checks import CHECKS, failure_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.random_models import MODELS, MONO, language_model
from musicgen_svc.engine.chain import chain
from musicgen_svc.engine.chain.chain import Chain
from musicgen_svc.engine.decoder import Decoder
from musicgen_svc.engine.factory import batch_for
from musicgen_svc.engine.state import ActiveExtent, Capacity, DeviceState
from musicgen_svc.engine.static import StaticBatch
from musicgen_svc.errors import GenerationError, WeightsError
from tests.fixtures.pretend_gpu import pretend_gpu

HERE = Path(__file__).parent
SMALL = {"dim": 1024, "heads": 16}
ON_A_CPU = [name for name, check in CHECKS.items() if check.on_cpu]
HALVES = ON_A_CPU[::2], ON_A_CPU[1::2]


class Outcome(NamedTuple):
    """What a program said of a check."""

    cases: int
    seconds: float
    failure: str | None


@pytest.fixture(scope="module")
def interpreted(all_kernels: bool) -> dict[str, Outcome]:
    """The outcomes of all checks with Triton's interpreter. Two programs run at a time."""
    environment = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent.parent)}
    command = [sys.executable, "-W", "error", HERE / "chain_checks.py", *(["--all"] if all_kernels else [])]
    programs = [
        subprocess.Popen(
            [*command, *names], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | environment,
        )
        for names in HALVES
    ]  # fmt: skip
    outcomes = {}
    try:
        for program in programs:
            output, errors = program.communicate(timeout=7000 if all_kernels else 280)
            assert program.returncode == 0, errors
            for line in output.splitlines():
                name, *outcome = json.loads(line)
                outcomes[name] = Outcome(*outcome)
    finally:
        for program in programs:
            program.kill()
            program.wait()
    return outcomes


@pytest.mark.timeout(7200)  # if all cases are run
@pytest.mark.parametrize("check", ON_A_CPU)
def test_interpreted_kernels_give_the_plain_results(check: str, interpreted: dict[str, Outcome]) -> None:
    cases, seconds, failure = interpreted[check]
    print(f"{check}: {cases} cases, {seconds:.0f} s")
    assert failure is None, failure


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("check", CHECKS)
def test_kernels_on_a_gpu_give_the_plain_results(check: str, all_kernels: bool) -> None:
    _, failure = failure_of(CHECKS[check], torch.device("cuda"), every=all_kernels)
    assert failure is None, failure


# --- launches -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "slots", "most"),
    [("text", 1, 8), ("text", 4, 8), ("melody", 4, 5), ("text", 16, 12), ("melody", 16, 12)],
)
def test_a_layer_has_few_launches_and_few_stand_around_the_layers(kind: str, slots: int, most: int) -> None:
    one, three = (len(recorded(slots, kind=kind, layers=layers, **SMALL).seen) for layers in (1, 3))
    per_layer = (three - one) / 2
    assert per_layer <= most and one - per_layer <= 6


class OnlyViews(TorchDispatchMode):
    """Refuses every operation of PyTorch that is not a view of its argument."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert func.is_view or func.namespace == "prim", f"{func} would be launched"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("slots", [1, 4, 16])
def test_no_operation_of_pytorch_stands_between_the_launches(
    name: str, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, delays = MODELS[name]
    decoder = Decoder(language_model(kind, delays=delays, dtype=torch.float16, device="meta"))
    state, steps, recorder = DeviceState(decoder, Capacity(slots)), Chain(decoder, slots), Recorder()
    monkeypatch.setattr(chain, "Launches", lambda device: recorder)
    with torch.inference_mode(), OnlyViews():
        logits = steps.logits(state, ActiveExtent(slots, 256, 64))
        steps.draw(state, logits, slice(slots))
    kernels = [launch.kernel.__name__ for launch in recorder.seen]
    assert kernels[0] == "embed" and kernels[-3:] == ["soften", "order", "draw"]
    assert kernels.count("attend") == 3 * (2 if kind == "text" else 1)
    with pytest.raises(AssertionError, match="would be launched"), OnlyViews():
        state.position()


# --- what a chain cannot compute ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["in_proj", "out_proj", "linear1", "linear2"])
def test_a_model_with_a_bias_is_refused_so_the_null_row_needs_no_cross_attention(name: str) -> None:
    """With a bias, the cross-attention of the null row would not be zero."""
    lm = language_model(dim=32, layers=2, heads=2, card=40)
    layer = lm.transformer.layers[1]
    if name == "in_proj":
        layer.cross_attention.in_proj_bias = nn.Parameter(torch.ones(96))
    else:
        owner = layer.cross_attention if name == "out_proj" else layer
        getattr(owner, name).bias = nn.Parameter(torch.ones(getattr(owner, name).out_features))
    with pytest.raises(WeightsError, match="projections without biases was expected"):
        Decoder(lm)


@pytest.mark.parametrize(
    ("heads", "activation", "reason"),
    [
        (2, F.gelu, "the attention heads are 24 wide, which is no power of two"),
        (3, F.relu, "the activation is not GELU"),
    ],
)
def test_a_decoder_that_the_kernels_cannot_compute_is_decoded_without_them(
    heads: int,
    activation: Any,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    lm = language_model(dim=48, layers=1, heads=heads, card=40, delays=MONO)
    for layer in lm.transformer.layers:
        layer.activation = activation
    with pytest.raises(ValueError, match=reason):
        Chain(Decoder(lm), 1)
    with pytest.raises(GenerationError, match=f"Kernels are on, but cannot be used: ValueError: {reason}"):
        batch_for(lm, batch_kind="static", kernels="on")
    with pretend_gpu(monkeypatch), caplog.at_level(logging.INFO):
        batch = batch_for(lm.to("cuda"), graphs="off")
        assert isinstance(batch, StaticBatch) and batch.path == "plain"
    assert f"without kernels, because ValueError: {reason};" in caplog.text
