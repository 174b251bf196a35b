"""A checkout with the real predict.py and command line, but with a toy service without torch and weights.

toy_service.py says what each prompt does. Everything around the service can thus be tested in seconds, and in
states that the real service is rarely in.
"""

import re
import shutil
from pathlib import Path

from server import ROOT

SERVICE = Path(__file__).with_name("toy_service.py")
KEPT = (
    "__init__.py", "errors.py", "request.py", "settings.py", "engine/__init__.py",
    "engine/sampling_params.py", "runtime/__init__.py", "runtime/json_object.py", "runtime/machine.py",
    "runtime/output_files.py", "runtime/slots.py",
)  # fmt: skip


def checkout(folder: Path, **constants: float) -> Path:
    """Makes such a checkout, and returns its folder.

    Args:
        folder: an empty or absent folder.
        constants: names of constants in `musicgen_svc/cli`, and the values that replace theirs.
    """
    (folder / "musicgen_svc").mkdir(parents=True)
    for name in ("predict.py", "openapi_schema.json"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "musicgen_svc" / "cli", folder / "musicgen_svc" / "cli")
    for name, value in {"ANSWERS_S": 1.0, **constants}.items():
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
    """Replaces a pattern in a file. Returns how often."""
    text, found = re.subn(pattern, by, path.read_text())
    path.write_text(text)
    return found
