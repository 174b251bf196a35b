"""Demucs does not compute silent rows, and the result is the same."""

import json
import random
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from demucs.apply import BagOfModels
from demucs.demucs import Demucs
from torch import Tensor

from musicgen_svc.errors import WeightsError
from musicgen_svc.loading.parts import separator_spec
from musicgen_svc.models.demucs import Separator, load_separator

CPU = torch.device("cpu")
RATE_HZ = 32_000


def separator(normalize: bool = True) -> Separator:
    """Makes a small separator with random weights, whose biases give a signal even for silence."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Demucs(
            ["drums", "bass", "other", "vocals"], channels=4, depth=2, lstm_layers=0, resample=False,
            segment=2, normalize=normalize,
        )  # fmt: skip
    return Separator(BagOfModels([model]).eval(), RATE_HZ)


def separated(
    separate: Separator, audio: Tensor, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, set[int], Any]:
    """Returns the stems, how many rows Demucs computed at a time, and the state of `random` afterwards."""
    rows: set[int] = set()
    forward = Demucs.forward
    monkeypatch.setattr(Demucs, "forward", lambda self, mix: (rows.add(len(mix)), forward(self, mix))[1])
    random.seed(3)
    return separate(audio), rows, random.getstate()


@pytest.fixture
def both() -> Tensor:
    """A row of noise and a row of silence: [2, 1, T]."""
    noise = torch.randn(1, 3 * RATE_HZ + 11, generator=torch.Generator().manual_seed(1)) / 5
    return torch.stack([noise, torch.zeros_like(noise)])


def test_a_silent_row_has_the_result_of_demucs_and_is_not_computed(
    both: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    separate = separator()
    found, rows, state = separated(separate, both, monkeypatch)
    assert rows == {1}
    monkeypatch.setattr(separate, "_leaves_silence", False)
    asked, all_rows, state_of_both = separated(separate, both, monkeypatch)
    assert all_rows == {2}
    assert state == state_of_both
    assert torch.equal(found[1], asked[1]) and found[1].count_nonzero() == 0
    torch.testing.assert_close(found[0], asked[0], atol=1e-6, rtol=0)
    assert asked[0].std() > 0.001


def test_silence_is_computed_if_the_model_does_not_normalize(
    both: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, rows, _ = separated(separator(normalize=False), both, monkeypatch)
    assert rows == {2}
    assert found[1].abs().max() > 0.001


def test_silence_draws_as_many_random_numbers_as_sound(both: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    found, _, state = separated(separator(), both[1:], monkeypatch)
    assert found.count_nonzero() == 0
    assert state == separated(separator(), both[:1], monkeypatch)[2]


def test_every_layer_ticks_for_the_request_that_runs_it(both: Tensor) -> None:
    """And not for another request that runs in between on another thread."""
    separate = separator()
    ticks: dict[str, list[int]] = {"outer": [], "inner": []}

    def inner_tick(done: int, total: int) -> None:
        ticks["inner"].append(done)

    def tick(done: int, total: int) -> None:
        ticks["outer"].append(done)
        if len(ticks["outer"]) == 5:
            other = threading.Thread(target=separate, args=(both[:1], inner_tick))
            other.start()
            other.join()

    separate(both[:1], tick)
    layers = sum(next(part.children(), None) is None for part in separate._bag.modules())
    assert len(ticks["outer"]) == len(ticks["inner"]) > layers
    assert ticks["outer"] == sorted(ticks["outer"]) and ticks["outer"][-1] > 0

    def stop(done: int, total: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        separate(both[:1], stop)
    separate(both[:1], tick)


ELSEWHERE = ["/abs/955717e8", "../htdemucs/955717e8", "a/b", "..", ".hidden", "", "a\\b", "a b", {"a": 1}]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_the_models_of_a_demucs_are_files_beside_its_list(name: Any, weights: Path, tmp_path: Path) -> None:
    """The list is not trusted: it may name any file of the machine."""
    folder = Path(shutil.copytree(weights / "htdemucs", tmp_path / "own"))
    shutil.copytree(weights / "htdemucs", tmp_path / "htdemucs")
    if name == "/abs/955717e8":
        name = f"{weights}/htdemucs/955717e8"
    (folder / "htdemucs.yaml").write_text(json.dumps({"models": [name]}))
    for read in (load_separator, separator_spec):
        with pytest.raises(WeightsError, match=r"htdemucs\.yaml (names the model|has models)"):
            read(folder, RATE_HZ, CPU)
