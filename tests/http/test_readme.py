"""The client examples in README and docs work unchanged, and their tables agree with the code."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import LIMIT_S
from replies import output
from server import ROOT, CogServer

from musicgen_svc.settings import Settings, variable

README = (ROOT / "README.md").read_text()
HTTP = (ROOT / "docs" / "http.md").read_text()
LIVE = (ROOT / "docs" / "live.md").read_text()
SETTINGS = (ROOT / "docs" / "settings.md").read_text()
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
ADDRESS = "http://127.0.0.1:5000"


def block(page: str, language: str, holding: str) -> str:
    """The one code block of a language on a page that holds a string."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    found = [text for text in blocks if holding in text]
    assert len(found) == 1, (language, holding, len(found))
    return str(found[0])


@pytest.mark.parametrize("page", [README, HTTP], ids=["README", "docs/http.md"])
def test_the_curl_example(server: CogServer, tmp_path: Path, page: str) -> None:
    example = block(page, "bash", "curl").replace(ADDRESS, server.url)
    shown = subprocess.run(
        ["bash", "-c", example], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=LIMIT_S
    )
    output(json.loads(shown.stdout))


def test_the_python_example(server: CogServer, tmp_path: Path) -> None:
    example = block(HTTP, "python", ADDRESS).replace(ADDRESS, server.url)
    shown = subprocess.run(
        [sys.executable, "-c", example],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=LIMIT_S,
    )
    assert (tmp_path / "output.wav").read_bytes()[:4] == b"RIFF"
    assert "'seed': 7" in shown.stdout


def test_the_live_example(server: CogServer, tmp_path: Path) -> None:
    example = block(LIVE, "python", ADDRESS)
    assert len([line for line in example.splitlines() if line]) <= 15
    shown = subprocess.run(
        [sys.executable, "-c", example.replace(ADDRESS, server.url)],
        cwd=tmp_path, capture_output=True, text=True, check=True, timeout=LIMIT_S,
    )  # fmt: skip
    assert (tmp_path / "output.wav").read_bytes()[:4] == b"RIFF"
    lengths = [tuple(map(int, line.split())) for line in shown.stdout.splitlines()]
    assert lengths[0] == (0, 2 * 9600) and sum(length for _, length in lengths) == 8 * 32_000 * 2


def test_every_setting_is_in_the_table_with_its_default() -> None:
    for field in dataclasses.fields(Settings):
        row = re.search(rf"^\| `{variable(field)}` \| (.*?) \|", SETTINGS, flags=re.MULTILINE)
        assert row, field.name
        if field.default is not None:
            default = str(field.default).lower().removesuffix(".0") or "–"
            assert row[1].strip("`") == default, (field.name, row[1])


def test_every_input_is_in_the_table_with_its_default() -> None:
    inputs = json.loads((ROOT / "openapi_schema.json").read_text())["components"]["schemas"]["Input"]
    for name, field in inputs["properties"].items():
        row = re.search(rf"^\| `{name}` \| (.*?) \| (.*?) \|", README, flags=re.MULTILINE)
        assert row, name
        expected = "–" if field["default"] is None else str(field["default"]).lower().removesuffix(".0")
        assert row[2].strip("`") == expected, (name, row[2])


def test_the_file_tree_names_every_file() -> None:
    """Every file outside tests/ and weights/ that git knows: what somebody made in the checkout is none."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    for path in map(Path, listed.stdout.splitlines()):
        if path.parts[0] in ("tests", "weights") or "results" in path.parts:
            continue
        if not any(part.startswith(("_", ".")) for part in path.parts):
            assert path.name in ARCHITECTURE, f"{path} is not in the file tree of docs/architecture.md"


def test_links_between_the_pages_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)", page.read_text()):
            assert not target or (page.parent / target).exists(), (page.name, target)


def test_the_readme_is_short() -> None:
    assert len(README.split()) <= 1300
