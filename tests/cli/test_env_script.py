"""scripts/_env: the variables that it sets, and the Python that it uses with MUSICGEN_NO_VENV."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.cli.repository import ROOT

PYTHON = """#!/usr/bin/env bash
# Replaces Python, and fails as if there were no GPU.
echo "$0 $PYTHONPATH" >&2
exit 7
"""


@pytest.mark.parametrize(
    ("there", "named", "chosen"),
    [
        (["python", "python3"], None, "python"),
        (["python3"], None, "python3"),
        (["python", "mine"], "mine", "mine"),
    ],
)
def test_gpu_check_runs_with_the_machines_own_python(
    there: list[str], named: str | None, chosen: str, tmp_path: Path
) -> None:
    for name in there:
        (tmp_path / name).write_text(PYTHON)
        (tmp_path / name).chmod(0o755)
    for name in ("bash", "dirname", "mkdir"):
        (tmp_path / name).symlink_to(shutil.which(name) or name)
    named_so = {} if named is None else {"MUSICGEN_PYTHON": named}
    ended = subprocess.run(
        [ROOT / "scripts" / "gpu_check", tmp_path / "rows"],
        env={"PATH": os.fspath(tmp_path), "MUSICGEN_NO_VENV": "1", "PYTHONPATH": "/brought"} | named_so,
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert ended.returncode == 7
    assert ended.stderr == f"{tmp_path}/{chosen} {ROOT}:/brought\n"


@pytest.mark.parametrize(
    "name", ["THP_MEM_ALLOC_ENABLE", "OMP_WAIT_POLICY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"]
)
@pytest.mark.parametrize("wanted", [None, "another"])
def test_variables_of_libraries_are_those_of_the_image_unless_the_user_set_them(
    name: str, wanted: str | None
) -> None:
    """Large pages for tensors, threads that sleep while they wait, and a bounded cache of operations."""
    script = f'source "$0"; environment; echo "${name}"'
    said = subprocess.run(
        ["bash", "-euc", script, ROOT / "scripts" / "_env"],
        env={"PATH": os.environ["PATH"], "MUSICGEN_NO_VENV": "1"}
        | ({} if wanted is None else {name: wanted}),
        capture_output=True, text=True, check=True, timeout=60,
    ).stdout.strip()  # fmt: skip
    config = yaml.safe_load((ROOT / "cog.yaml").read_text())
    image = dict(entry.split("=", 1) for entry in config["environment"])
    assert said == (wanted or image[name])


def test_scripts_that_run_in_the_users_folder_import_nothing_from_it() -> None:
    for path in (ROOT / "scripts").iterdir():
        text = path.read_text()
        if '"$PYTHON" ' in text and path.name != "_env" and '\ncd "$ROOT"\n' not in text:
            assert '"$PYTHON" -P -m ' in text, path.name


def test_cdpath_does_not_change_the_root(tmp_path: Path) -> None:
    """`cd` prints the folder that it has found through CDPATH."""
    said = subprocess.run(
        ["bash", "-euc", 'source scripts/_env; echo "$ROOT"'], cwd=ROOT,
        env={"PATH": os.environ["PATH"], "CDPATH": f"{tmp_path}:."},
        capture_output=True, text=True, check=True, timeout=60,
    ).stdout  # fmt: skip
    assert said == f"{ROOT}\n"
