"""The environment variables of a Cog server."""

from pathlib import Path

import pytest

from musicgen_svc.cli import weights_folder
from musicgen_svc.cli.cog_server import environment
from tests.cli.repository import ROOT


def test_a_path_is_where_the_user_is_and_a_link_stays_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies beside a link is looked for there; and what is not there is the checkout's."""
    (tmp_path / "store").mkdir()
    (tmp_path / "current").symlink_to(tmp_path / "store")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COG_WEIGHTS", "current")
    monkeypatch.setenv("MUSICGEN_WEIGHTS_DIR", "store")
    given = environment(5000, tmp_path)
    assert given["COG_WEIGHTS"] == str(tmp_path / "current")
    assert given["MUSICGEN_WEIGHTS_DIR"] == str(weights_folder.chosen_folder().absolute())
    monkeypatch.setenv("MUSICGEN_WEIGHTS_DIR", "weights")
    assert environment(5000, tmp_path)["MUSICGEN_WEIGHTS_DIR"] == "weights"  # the server runs there
    assert weights_folder.chosen_folder() == ROOT / "weights"
    (tmp_path / "weights").mkdir()
    monkeypatch.delenv("MUSICGEN_WEIGHTS_DIR")
    assert weights_folder.chosen_folder() == ROOT / "weights"


def test_a_gpu_takes_as_many_at_once_as_it_holds_and_a_cpu_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def at_once() -> str:
        return environment(5000, tmp_path)["COG_MAX_CONCURRENCY"]

    monkeypatch.delenv("COG_MAX_CONCURRENCY", raising=False)
    monkeypatch.delenv("MUSICGEN_DEVICE", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert at_once() == "1"
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho No devices were found; exit 6\n")
    tool.chmod(0o755)
    assert at_once() == "1"
    expected = {"8192": "1", "15360": "1", "24564": "4", "32607": "8", "46068": "16", "143771": "16"}
    for memory_mib, held in expected.items():
        tool.write_text(f"#!/bin/sh\necho {memory_mib}\necho 150000\n")
        assert at_once() == held
    tool.write_text("#!/bin/sh\necho 24564\n")
    assert f"@concurrent(max={at_once()})" in (ROOT / "predict.py").read_text()
    assert f"COG_MAX_CONCURRENCY={at_once()} " in (ROOT / "cog.yaml").read_text(), (
        "what the image is made for"
    )
    monkeypatch.setenv("MUSICGEN_DEVICE", "cpu")
    assert at_once() == "1"
    monkeypatch.setenv("COG_MAX_CONCURRENCY", "7")
    assert at_once() == "7"
