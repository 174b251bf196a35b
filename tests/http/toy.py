"""A checkout whose service is a toy: the real predict.py, scripts and coglet, without torch or weights.

What a prompt does is said in the toy; everything that is not the service's own is thus tested in
seconds, and in states that the real one cannot be brought into at will.
"""

import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SERVICE = Path(__file__).with_name("toy_service.py")
KEPT = (
    "__init__.py", "errors.py", "request.py", "settings.py", "engine/__init__.py",
    "engine/sampling_params.py",    "runtime/__init__.py", "runtime/output_files.py",
)  # fmt: skip


def checkout(folder: Path, **constants: float) -> Path:
    """Makes it in `folder`, which is returned.

    Args:
        folder: an empty or absent folder.
        constants: other values for constants of `musicgen_svc/cli`, by their names.
    """
    (folder / "musicgen_svc").mkdir(parents=True)
    for name in ("predict.py", "openapi_schema.json"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "musicgen_svc" / "cli", folder / "musicgen_svc" / "cli")
    for name, value in {"OPEN_REQUESTS_S": 1.0, **constants}.items():
        replaced = [
            _replace(path, rf"(?m)^{name} = .*", f"{name} = {value}")
            for path in (folder / "musicgen_svc" / "cli").glob("*.py")
        ]
        assert sum(replaced) == 1, name
    for name in KEPT:
        target = folder / "musicgen_svc" / name
        target.parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / "musicgen_svc" / name, target)
    shutil.copy(SERVICE, folder / "musicgen_svc" / "service.py")
    return folder


def _replace(path: Path, pattern: str, by: str) -> int:
    text, found = re.subn(pattern, by, path.read_text())
    path.write_text(text)
    return found


needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")


def processes_with(text: str) -> list[int]:
    """Processes whose environment holds `text`, zombies left out: they hold nothing any more."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if text.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def wait_for(condition: Callable[[], object], limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
