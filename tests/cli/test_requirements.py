"""requirements.lock and requirements.txt: one set of versions, which can be installed, and no hosts."""

import re
import tomllib

import musicgen_svc
from tests.cli.repository import ROOT

LOCK = (ROOT / "requirements.lock").read_text()
IMAGE = (ROOT / "requirements.txt").read_text()
RAY = (ROOT / "requirements-ray.lock").read_text()
LEFT_OUT = {"xformers", "torchvision", "torchtext", "gradio", "spacy"}
PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", flags=re.MULTILINE)


def pins(text: str) -> dict[str, set[str]]:
    """Versions by name; a package may have more than one, by Python's version."""
    found: dict[str, set[str]] = {}
    for name, version in PIN.findall(text):
        found.setdefault(name, set()).add(version)
    return found


def declared(section: list[str]) -> set[str]:
    return {re.split(r"[<>=~;\[ ]", requirement)[0].replace("_", "-") for requirement in section}


def test_the_image_gets_the_versions_of_the_lock_and_none_of_the_tests_tools() -> None:
    lock, image = pins(LOCK), pins(IMAGE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = declared(project["dependencies"])
    assert image and all(lock[name] == versions for name, versions in image.items())
    assert needed - image.keys() == {"audiocraft", "cog"}, "Cog installs itself, cog.yaml audiocraft"
    assert not declared(project["optional-dependencies"]["dev"]) & image.keys()


def test_what_we_declare_is_locked_with_hashes() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    every = declared(project["dependencies"] + project["optional-dependencies"]["dev"])
    assert every <= pins(LOCK).keys()
    assert pins(LOCK)["torch"] == pins(LOCK)["torchaudio"] == {"2.11.0"}
    blocks = re.split(r"^(?=[A-Za-z0-9._-]+==)", LOCK, flags=re.MULTILINE)[1:]
    assert len(blocks) > 80 and all("--hash=sha256:" in block for block in blocks)


def test_the_ray_extra_adds_packages_and_changes_none() -> None:
    """Its packages are added to an environment of requirements.lock, or to the image."""
    added, lock, image = pins(RAY), pins(LOCK), pins(IMAGE)
    assert {"ray", "pyarrow", "grpcio"} <= added.keys()
    assert not added.keys() & image.keys() and "torch" not in added
    assert all(lock[name] == versions for name, versions in added.items() if name in lock)
    blocks = re.split(r"^(?=[A-Za-z0-9._-]+==)", RAY, flags=re.MULTILINE)[1:]
    assert all("--hash=sha256:" in block for block in blocks)


def test_nothing_of_audiocrafts_old_stack_is_installed() -> None:
    assert not LEFT_OUT & (pins(LOCK).keys() | pins(IMAGE).keys())


def test_the_version_of_the_service_is_written_once() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert pyproject["project"]["dynamic"] == ["version"]
    assert pyproject["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "musicgen_svc.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", musicgen_svc.__version__)


def test_no_host_is_named() -> None:
    every = LOCK + IMAGE + RAY
    assert "://" not in every and "--index" not in every and "--find-links" not in every
