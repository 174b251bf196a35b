"""`scripts/bench` measures both loops, says what it compared, and fails where tokens differ."""

import json
import sys
from pathlib import Path

import _bench
import pytest
import torch

from musicgen_svc.engine import engine


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Runs on a tiny model; the report is where this says."""
    monkeypatch.setitem(_bench.SIZES, "small", {"kind": "text", "dim": 64, "layers": 2, "heads": 4})
    monkeypatch.setattr(_bench, "copy_bandwidth", lambda device: 10.0)
    path = tmp_path / "report.json"
    monkeypatch.setattr(
        sys, "argv", ["bench", "--seconds", "0.4", "--slots", "1,2", "--engine-only", "--json", str(path)]
    )
    return path


def test_a_report_has_every_pair_of_every_number_of_slots(
    report: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _bench.main() == 0
    rows = json.loads(report.read_text())["rows"]
    assert [row["slots"] for row in rows] == [1, 2]
    for row in rows:
        pairs = zip(row["audiocraft_steps_per_s"], row["engine_steps_per_s"], row["ratio"], strict=True)
        for theirs, ours, ratio in pairs:
            assert ratio == pytest.approx(row["slots"] * ours / theirs) and theirs > 0
        assert len(row["ratio"]) == 3 and row["tokens"] == "equal"
    assert "ratio min / median / max" in capsys.readouterr().out


def test_tokens_that_differ_fail_the_command(report: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = engine.draw
    monkeypatch.setattr(engine, "draw", lambda *a: (draw(*a) + 1) % 2048)
    assert _bench.main() == 1
    assert "differ from frame 0" in [row["tokens"] for row in json.loads(report.read_text())["rows"]]


def test_bytes_read_are_the_weights_and_the_mean_cache() -> None:
    lm = _bench.language_model(dim=64, layers=2, card=100)
    given = [_bench.conditions(dim=64)]
    work = _bench.Workload(lm, given, 47, _bench.SamplingParams(), torch.device("cpu"))
    layer = 64 * 64 * (4 + 2 + 8)  # self-attention, what is left of cross-attention, feed-forward
    norms = 2 * (2 * 3 * 64) + 2 * 64
    weights = 2 * layer + 4 * 100 * 64 + norms
    cache = 2 * 2 * 2 * 64 * (50 / 2)  # keys and values, rows, layers, dim, half of the columns
    assert _bench.bytes_per_step(work, 1) == 4 * (weights + cache)
    assert _bench.bytes_per_step(work, 3) == 4 * (weights + 3 * cache)
