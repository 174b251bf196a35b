"""scripts/_env where the packages are there already: the Python that was named, and no environment."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYTHON = """#!/usr/bin/env bash
# Stands for Python: says that there is no GPU.
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
