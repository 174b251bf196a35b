"""cog.yaml has Cog's current keys and the versions of requirements.lock, and .dockerignore fits the image."""

import ast
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from musicgen_svc.settings import Settings
from musicgen_svc.weights.catalog import MANIFEST
from musicgen_svc.weights.paths import FETCHED, UNPACKED

ROOT = Path(__file__).resolve().parents[1]
CONFIG = yaml.safe_load((ROOT / "cog.yaml").read_text())
BUILD = CONFIG["build"]
LOCK = dict(
    re.findall(r"^([\w.-]+)==([^\s;\\]+)", (ROOT / "requirements.lock").read_text(), flags=re.MULTILINE)
)
REQUIREMENTS = dict(
    re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / "requirements.txt").read_text(), flags=re.MULTILINE)
)

# The keys in Cog's schema of the file, without the deprecated ones.
KEYS = {"build", "environment", "image", "model", "run", "weights"}
BUILD_KEYS = {
    "cuda",
    "cudnn",
    "gpu",
    "python_requirements",
    "python_version",
    "run",
    "sdk_version",
    "system_packages",
}

# CUDA versions for which Cog has a build of the locked torch.
CUDA = {"2.11.0": {"12.6", "12.8", "12.9", "13.0"}}


def test_only_current_keys_are_used() -> None:
    assert CONFIG.keys() <= KEYS
    assert BUILD.keys() <= BUILD_KEYS
    assert all(re.fullmatch(r"[A-Z][A-Z0-9_]*=.*", entry) for entry in CONFIG["environment"])


def test_versions_are_texts() -> None:
    """YAML would read 3.10 and 12.80 as the numbers 3.1 and 12.8."""
    assert all(isinstance(BUILD[key], str) for key in ("python_version", "cuda", "sdk_version"))


def test_it_points_at_the_runner() -> None:
    file, _, name = CONFIG["run"].partition(":")
    classes = [
        node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.ClassDef)
    ]
    assert classes == [name]


def test_the_image_has_the_versions_of_the_lock() -> None:
    assert BUILD["sdk_version"] == LOCK["cog"]
    assert BUILD["cuda"] in CUDA[LOCK["torch"]]
    assert BUILD["gpu"] is True
    assert f"audiocraft=={LOCK['audiocraft']}" in " ".join(BUILD["run"])
    assert "--no-deps" in " ".join(BUILD["run"])
    assert REQUIREMENTS["torch"] == LOCK["torch"]
    assert {name: LOCK[name] for name in REQUIREMENTS} == REQUIREMENTS


def test_the_image_has_a_python_that_we_support() -> None:
    assert f'requires-python = "=={BUILD["python_version"]}.*"' in (ROOT / "pyproject.toml").read_text()


def test_requirements_leave_out_what_cog_installs() -> None:
    """Cog installs its own packages and replaces torch. `run` installs audiocraft without its pins."""
    assert BUILD["python_requirements"] == "requirements.txt"
    assert not REQUIREMENTS.keys() & {"cog", "coglet", "audiocraft", "triton"}
    assert not [name for name in REQUIREMENTS if name.startswith(("nvidia-", "cuda-"))]
    assert "setuptools" in REQUIREMENTS  # audiocraft is built with it


def ignored(path: str) -> bool:
    """Whether .dockerignore excludes a path. A pattern matches a path from the root, and all below it."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    parts = path.split("/")
    for pattern in patterns:
        anywhere = pattern.startswith("**/")
        for end in range(1, len(parts) + 1):
            head = parts[:end]
            if anywhere and fnmatch(head[-1], pattern.removeprefix("**/")):
                return True
            if len(head) == pattern.count("/") + 1 and fnmatch("/".join(head), pattern):
                return True
    return False


@pytest.mark.parametrize(
    "path",
    [
        ".git/config", ".ci/run", ".venv/bin/python", ".venvs/3.12-0/bin/python", ".cache/uv",
        ".ruff_cache/x", ".pytest_cache/x",
        ".mypy_cache/x", "tests/test_cog_yaml.py", "benchmarks/results.json", "output.wav", "output-1.mp3",
        "deploy/kubernetes/service.yaml",
        "musicgen_svc/__pycache__/audio.cpython-312.pyc", "scripts/serve.pyc",
        "weights/.partial/small/x", f"weights/{FETCHED}/x", f"weights/{UNPACKED}/x/state_dict.bin",
    ],
)  # fmt: skip
def test_what_the_image_does_not_need_stays_out(path: str) -> None:
    assert ignored(path)


@pytest.mark.parametrize(
    "path",
    [
        "predict.py", "requirements.txt", "musicgen_svc/service.py", "weights/manifest.json",
        "weights/finetuned/state_dict.bin", "weights/8songs/state_dict.bin",
        "weights/small/compression_state_dict.bin",
    ],
)  # fmt: skip
def test_what_the_image_needs_goes_in(path: str) -> None:
    assert not ignored(path)


def test_weights_in_the_image_are_where_the_service_looks() -> None:
    """The image contains the default folder, and sets no variable that names another one."""
    assert not ignored(f"{Settings().weights_dir}/small/state_dict.bin")
    assert not [entry for entry in CONFIG["environment"] if entry.startswith("MUSICGEN_WEIGHTS_DIR")]


def test_mounted_weights_hide_nothing_that_the_service_needs() -> None:
    """The manifest in weights/ is part of the service, and must stay visible when weights are mounted."""
    command = re.search(
        r"^docker run .* -v .*$", (ROOT / "docs" / "weights.md").read_text(), flags=re.MULTILINE
    )
    assert command
    mount = re.search(r"-v \S+?:(\S+) ", command[0])
    assert mount and f"-e MUSICGEN_WEIGHTS_DIR={mount[1]} " in command[0]
    manifest = MANIFEST.relative_to(ROOT)
    assert not ignored(str(manifest))
    assert not (Path("/src") / manifest).is_relative_to(mount[1]), "Cog puts the project into /src"
