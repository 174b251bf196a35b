"""The benchmark of latency measures the real server, and fails beyond its bounds."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import latency, load_files
from benchmarks.random_models import SIZES, TINY_SIZES


def test_each_length_is_measured_from_its_first_request_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint is written as one of real size, with tiny models."""
    monkeypatch.setattr(load_files, "T5_BASE", load_files.T5_BASE | {"d_ff": 16, "num_layers": 1})
    monkeypatch.setitem(SIZES, "small", TINY_SIZES["small"])
    monkeypatch.setattr(latency, "LENGTHS_S", (1, 2))
    for name in ("COG_WEIGHTS", "MUSICGEN_WEIGHTS_DIR", "MUSICGEN_DEVICE"):
        monkeypatch.setenv(name, "")
    file = tmp_path / "latency.json"
    bounds = ["--at-most", "seconds@1=1e-6", "--at-most", "seconds@2=1000"]
    monkeypatch.setattr(sys, "argv", ["", "--json", str(file), *bounds])
    assert latency.main() == 1
    found = json.loads(file.read_text())
    assert len(found["failed"]) == 1 and "With 1 s of audio seconds is" in found["failed"][0]
    for seconds in ("1_s", "2_s"):
        first, *later = found[seconds]["requests_s"]
        assert len(later) == 2 and min(first, *later) > 0
        assert found[seconds]["first"] == pytest.approx(first / found[seconds]["seconds"])
    assert found["setup_s"] > 0 and {"cpu", "commit", "python"} <= found.keys()
    assert "2 s of audio: first request" in capsys.readouterr().out
