"""The README's client examples run as they stand, and its tables say what the code says."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from replies import output
from server import ROOT, CogServer

from musicgen_svc.settings import Settings, variable

README = (ROOT / "README.md").read_text()
ADDRESS = "http://127.0.0.1:5000"


def block(language: str, holding: str) -> str:
    """The one code block of a language that holds a string."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    found = [text for text in blocks if holding in text]
    assert len(found) == 1, (language, holding, len(found))
    return str(found[0])


def test_the_curl_example(server: CogServer, tmp_path: Path) -> None:
    example = block("bash", "curl").replace(ADDRESS, server.url)
    shown = subprocess.run(
        ["bash", "-c", example], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120
    )
    output(json.loads(shown.stdout))


def test_the_python_example(server: CogServer, tmp_path: Path) -> None:
    example = block("python", ADDRESS).replace(ADDRESS, server.url)
    shown = subprocess.run(
        [sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120
    )
    assert (tmp_path / "output.wav").read_bytes()[:4] == b"RIFF"
    assert "'seed': 7" in shown.stdout


def test_every_setting_stands_in_the_table_with_its_default() -> None:
    for field in dataclasses.fields(Settings):
        row = re.search(rf"^\| `{variable(field)}` \| (.*?) \|", README, flags=re.MULTILINE)
        assert row, field.name
        if field.default is not None:
            default = str(field.default).lower().removesuffix(".0")
            assert row[1].strip("`") == default, (field.name, row[1])


def test_every_input_stands_in_the_table_with_its_default() -> None:
    inputs = json.loads((ROOT / "openapi_schema.json").read_text())["components"]["schemas"]["Input"]
    for name, field in inputs["properties"].items():
        row = re.search(rf"^\| `{name}` \| (.*?) \| (.*?) \|", README, flags=re.MULTILINE)
        assert row, name
        expected = "–" if field["default"] is None else str(field["default"]).lower().removesuffix(".0")
        assert row[2].strip("`") == expected, (name, row[2])


@pytest.mark.parametrize("folder", ["musicgen_svc", "musicgen_svc/engine", "scripts"])
def test_the_file_tree_names_every_file(folder: str) -> None:
    tree = README.split("## Files", 1)[1]
    for path in (ROOT / folder).iterdir():
        if path.name.startswith(("_", ".")):
            continue
        assert path.name in tree, f"{path} is not in the README's file tree"
