"""scripts/test, with a stand-in for Python: it runs every test file once, and fails if any folder fails."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cli.repository import ROOT

FILES = [
    "tests/test_a.py", "tests/test_b.py", "tests/http/test_c.py", "tests/deep/down/test_d.py",
    "tests/models/test_e.py", "tests/parity/test_f.py",
]  # fmt: skip
PYTHON = """#!/usr/bin/env bash
echo "$*" >>runs
echo "report of $*"
[[ $* != *empty* ]] || exit 5
[[ $* != *broken* ]]
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in (*FILES, "tests/http/server.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "test", tmp_path / "scripts")
    (tmp_path / "scripts" / "_env").write_text(
        f'ROOT="{tmp_path}"; environment() {{ PYTHON="$ROOT/python"; }}\n'
        'ray_packages() { echo ray "$1"; }\n'
    )
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def run(checkout: Path, *arguments: str) -> tuple[int, list[str], str]:
    """Exit status, how Python was called, what was shown."""
    ended = subprocess.run(
        [checkout / "scripts" / "test", *arguments], capture_output=True, text=True, check=False, timeout=60
    )
    return ended.returncode, (checkout / "runs").read_text().splitlines(), ended.stdout


def test_every_file_is_run_once_and_every_report_is_shown(checkout: Path) -> None:
    status, runs, shown = run(checkout)
    assert status == 0
    assert all(called.startswith("-m pytest ") for called in runs)
    assert sorted(file for called in runs for file in called.split()[2:]) == sorted(FILES)
    assert all(f"report of {called}\n" in shown for called in runs)


def test_folders_with_the_same_imports_share_a_process(checkout: Path) -> None:
    together = [called for called in run(checkout)[1] if "tests/models/test_e.py" in called]
    assert together == ["-m pytest tests/models/test_e.py tests/parity/test_f.py"]


@pytest.mark.parametrize("folder", ["tests", "tests/http", "tests/deep", "tests/deep/down"])
def test_a_failure_anywhere_fails_it_and_keeps_nothing_from_running(checkout: Path, folder: str) -> None:
    (checkout / folder / "test_broken.py").touch()
    status, runs, _ = run(checkout)
    assert status != 0
    assert len([file for called in runs for file in called.split()[2:]]) == len(FILES) + 1


def test_a_folder_without_any_test_fails_it(checkout: Path) -> None:
    """Such as one whose file has no test function: pytest's status is 5."""
    (checkout / "tests" / "empty").mkdir()
    (checkout / "tests" / "empty" / "test_empty.py").touch()
    assert run(checkout)[0] != 0
    assert run(checkout, "empty")[0] == 5


def test_ray_is_installed_for_the_tests_that_need_it_and_for_no_others(checkout: Path) -> None:
    assert "ray install\n" in run(checkout)[2]
    assert "ray install\n" in run(checkout, "-x", "tests/cluster/test_d.py")[2]
    assert "ray" not in run(checkout, "tests/http")[2]


def test_arguments_go_to_pytest_as_they_are(checkout: Path) -> None:
    assert run(checkout, "-k", "a waltz", "tests/http")[:2] == (0, ["-m pytest -k a waltz tests/http"])
    assert run(checkout, "broken")[0] == 1
