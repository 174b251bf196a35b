"""compat.py is needed, sufficient, and the only door to audiocraft."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "musicgen_svc"


def _import_audiocraft_without(stand_in: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys\n"
        "from musicgen_svc import compat\n"
        f"for name in [m for m in sys.modules if m.split('.')[0] in ('audiocraft', {stand_in!r})]:\n"
        "    del sys.modules[name]\n"
        "import audiocraft.models\n"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["xformers", "spacy"])
def test_each_stand_in_is_still_needed(name: str) -> None:
    result = _import_audiocraft_without(name)
    assert result.returncode != 0, f"audiocraft imports without {name}: drop its stand-in"
    assert f"No module named '{name}'" in result.stderr


def test_the_table_names_every_stand_in() -> None:
    from musicgen_svc import compat

    made = {
        n.split(".")[0]
        for n, m in sys.modules.items()
        if str(vars(m).get("__doc__")).startswith("Stand-in for")
    }
    assert made == set(compat.STAND_INS)


def test_only_compat_imports_audiocraft() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.name == "compat.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(n.split(".")[0] == "audiocraft" for n in names), path
