"""The list of what `scripts/gpu_check` needs on a bare machine is complete, and nothing in it is in vain."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, distributions, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.gpu_check import Rows
from benchmarks.packages import BROUGHT, GIVEN, missing, requirements

ROOT = Path(__file__).parents[2]
OURS = ("musicgen_svc", "benchmarks", "training", "tests")
NOT_IMPORTED = {
    "encodec", "flashy", "gradio", "hydra-colorlog", "hydra-core", "num2words", "protobuf", "spacy", "sphn",
    "torchmetrics", "torchtext", "torchvision", "xformers",
}  # fmt: skip
"""What audiocraft and Demucs require for training, or for what is never called here."""


def rows_modules() -> list[str]:
    """The modules that the rows run, the server's, and the test files that need a GPU."""
    rows = Rows("cuda", 1.0)
    modules = {row.command[1] for row in (*rows.quick(), *rows.rest())} | {
        "predict",
        "musicgen_svc.cli.serve",
    }
    (tests,) = rows.tests()
    files = [word for word in tests.command if word.endswith(".py")] + ["tests/conftest.py"]
    return sorted(modules) + [file.removesuffix(".py").replace("/", ".") for file in files]


@cache
def own_modules() -> dict[str, Path]:
    """Every module of the repository by its name, or by each of its names."""
    found = {"predict": ROOT / "predict.py"}
    for top in OURS:
        for path in (ROOT / top).rglob("*.py"):
            found[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
            if (
                top == "tests"
            ):  # a test file imports modules in its own folder and in `tests` by their last name
                found.setdefault(path.stem, path)
    return found


def imported(path: Path) -> set[str]:
    """Names that a file imports, those in functions included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@cache
def reached() -> frozenset[str]:
    """The repository's modules that gpu_check imports sooner or later."""
    own, todo, found = own_modules(), rows_modules(), set[str]()
    while todo:
        module = todo.pop()
        if module not in found:
            found.add(module)
            todo += imported(own[module]) & own.keys()
    return frozenset(found)


@cache
def imported_distributions() -> frozenset[str]:
    """The distributions that these modules import."""
    own, providers, found = own_modules(), packages_distributions(), set[str]()
    for module in reached():
        for name in imported(own[module]) - own.keys():
            top = name.partition(".")[0]
            if top not in (*OURS, *own, *sys.stdlib_module_names):
                assert top in providers, f"{module} imports {top}, which no installed distribution provides"
                found |= {canonicalize_name(provider) for provider in providers[top]}
    return frozenset(found)


def required(name: str) -> set[str]:
    """Distributions that one requires on this machine. An unknown one requires nothing."""
    try:
        lines = distribution(name).requires or []
    except PackageNotFoundError:
        return set()
    asked = [Requirement(line) for line in lines]
    return {canonicalize_name(r.name) for r in asked if r.marker is None or r.marker.evaluate({"extra": ""})}


@cache
def given() -> frozenset[str]:
    """The machine's own distributions, with all that they require."""
    todo, found = [canonicalize_name(name) for name in GIVEN], set[str]()
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += required(name)
    return frozenset(found)


def lacking(brought: Iterable[str]) -> set[str]:
    """What is imported or required, and neither given nor brought."""
    has = given() | {canonicalize_name(name) for name in brought}
    needed = set(imported_distributions()).union(*map(required, brought))
    return needed - has - NOT_IMPORTED


def test_every_import_and_requirement_is_given_or_brought() -> None:
    assert len(imported_distributions()) > 20 and "imageio-ffmpeg" in imported_distributions()
    assert lacking(BROUGHT) == set()


@pytest.mark.parametrize("name", BROUGHT)
def test_no_package_is_brought_in_vain(name: str) -> None:
    assert name in lacking(set(BROUGHT) - {name})


def test_what_is_brought_has_the_version_of_the_lock_file() -> None:
    assert requirements(["PyYAML", "prometheus_client"])[0].startswith("pyyaml==")
    assert [line.partition("==")[0] for line in requirements()] == list(BROUGHT)
    ended = subprocess.run(
        [sys.executable, "-S", "-m", "benchmarks.packages"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout.split() == requirements()  # without any package


BARE = """
import importlib, importlib.metadata, json, sys

modules, hidden = json.load(sys.stdin)
finder = importlib.machinery.PathFinder


class Bare:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else finder.find_spec(name, path, target)

    @staticmethod
    def find_distributions(context=importlib.metadata.DistributionFinder.Context()):
        return (found for found in finder.find_distributions(context) if found.name not in hidden)


sys.meta_path[sys.meta_path.index(finder)] = Bare
for module in modules:
    importlib.import_module(module)
"""


def test_nothing_else_is_imported_on_a_machine_that_has_only_these() -> None:
    """All other distributions are hidden, so that a library that looks for one does not find it."""
    has = given() | set(BROUGHT)
    hidden = {d.name for d in distributions() if canonicalize_name(d.name) not in has}
    hidden |= {
        top
        for top, providers in packages_distributions().items()
        if top not in OURS and not has & {canonicalize_name(name) for name in providers}
    }
    assert {"ruff", "num2words", "accelerate"} <= hidden
    tests, own = ROOT / "tests", own_modules()
    modules = sorted(name for name in reached() if not own[name].is_relative_to(tests))
    ended = subprocess.run(
        [sys.executable, "-P", "-c", BARE],
        input=json.dumps([["tests.conftest", *modules], sorted(hidden)]),
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert missing() == []
