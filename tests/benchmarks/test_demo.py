"""`scripts/bench_demo` keeps what it has measured, and fails below its bounds."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import demo


@pytest.mark.parametrize(("least", "status"), [("22", 0), ("23", 1)])
def test_too_few_songs_fail_the_command(
    least: str, status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "demo.json"
    monkeypatch.setattr(demo, "Player", lambda weights: None)
    monkeypatch.setitem(demo.ROWS, "text", lambda player: {"song": 22, "timbre": 24, "of": 24})
    options = ["--rows", "text", "--json", str(file), "--at-least", f"song@text={least}"]
    monkeypatch.setattr(sys, "argv", ["", *options])
    assert demo.main() == status
    found = json.loads(file.read_text())
    assert found["text"]["song"] == 22 and {"cpu", "device", "python"} <= found["machine"].keys()

    monkeypatch.setitem(demo.ROWS, "text", lambda player: pytest.fail("it is not measured again"))
    assert demo.main() == status
