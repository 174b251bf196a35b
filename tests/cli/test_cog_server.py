"""The environment variables of a Cog server."""

from pathlib import Path

import pytest

from musicgen_svc.cli import cog_server, weights_folder
from musicgen_svc.cli.cog_server import allow_open_files, concurrency, environment
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


def test_as_many_requests_are_let_in_as_the_device_holds_and_as_may_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def at_once() -> str:
        return environment(5000, tmp_path)["COG_MAX_CONCURRENCY"]

    for name in ("COG_MAX_CONCURRENCY", "MUSICGEN_DEVICE", "MUSICGEN_SLOTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cog_server, "memory_bytes", lambda: 16 * 10**9)
    monkeypatch.setenv("MUSICGEN_WAITING", "0")
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
    monkeypatch.delenv("MUSICGEN_WAITING")
    assert at_once() == "65"
    monkeypatch.setenv("MUSICGEN_SLOTS", "5")
    monkeypatch.setenv("MUSICGEN_WAITING", "10")
    assert at_once() == "15"
    monkeypatch.setenv("COG_MAX_CONCURRENCY", "7")
    assert at_once() == "7", "the user's own number holds"


def test_the_limit_of_open_files_is_raised_as_far_as_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise Cog would fail in set-up, with a sentence that names neither the setting nor the limit."""
    limits, set_to = (256, 1024), list[tuple[int, int]]()
    monkeypatch.setattr(cog_server.resource, "getrlimit", lambda kind: limits)
    monkeypatch.setattr(cog_server.resource, "setrlimit", lambda kind, limits: set_to.append(limits))
    allow_open_files(68)
    assert set_to == [(256 + 4 * 68, 1024)]
    allow_open_files(192)
    with pytest.raises(SystemExit, match="193 predictions at once need 1028 open files, and the limit"):
        allow_open_files(193)
    limits = (20_000, 20_000)
    set_to.clear()
    allow_open_files(68)
    assert set_to == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MUSICGEN_WAITING", "many"), ("MUSICGEN_WAITING", "-1"), ("MUSICGEN_SLOTS", "1.5"),
        ("COG_MAX_CONCURRENCY", "0"),
    ],
)  # fmt: skip
def test_a_number_of_requests_that_is_none_is_one_sentence(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COG_MAX_CONCURRENCY", raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=f"{name} is '{value}'; it must be a whole number from"):
        concurrency()
