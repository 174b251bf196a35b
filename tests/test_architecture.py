"""The structure of the package: imports point down, and only the entry points import Cog."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "musicgen_svc"
LAYERS = (
    {"cli", "service"},
    {"batch"},
    {"backend"},
    {"pipeline"},
    {"generation", "live"},
    {"loading"},
    {"models", "engine", "audio", "weights", "windows", "request"},
    {"checkpoints", "settings"},
    {"runtime", "audiocraft_compat"},
    {"errors"},
)
"""Packages and top modules, from the top down. A module may import its own package, what is below its layer,
and what `BESIDE` says.
"""
BESIDE = {("request", "engine"), ("weights", "settings")}
"""A request holds `SamplingParams`, which is the engine's own."""


def imports(path: Path) -> set[str]:
    """Absolute names of the modules that a file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def graph() -> dict[str, set[str]]:
    """Each module of the package, and the modules of the package that it imports."""
    modules = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }
    return {name: (imports(path) & modules.keys()) - {name, "musicgen_svc"} for name, path in modules.items()}


def test_imports_have_no_cycle() -> None:
    edges = graph()
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, f"cycle: {' -> '.join((*above, module))}"
        if module not in done:
            for below in edges[module]:
                visit(below, (*above, module))
            done.add(module)

    for module in edges:
        visit(module, ())


def layer(part: str) -> int:
    return next(index for index, parts in enumerate(LAYERS) if part in parts)


def test_imports_point_down_from_layer_to_layer() -> None:
    for module, below in graph().items():
        own = part_of(module)
        for other in map(part_of, below):
            allowed = own == other or layer(own) < layer(other) or (own, other) in BESIDE
            assert allowed, f"{module} imports from {other}"


def test_the_command_line_needs_no_torch() -> None:
    """Neither the command line nor what it imports imports torch, which would take seconds."""
    edges = graph()
    seen: set[str] = set()
    to_see = [module for module in edges if part_of(module) == "cli"]
    while to_see:
        module = to_see.pop()
        if module not in seen:
            seen.add(module)
            to_see += edges[module]
            path = PACKAGE.parent / (module.replace(".", "/") + ".py")
            own = imports(path) if path.exists() else set()
            assert not any(name.split(".")[0] in ("torch", "transformers", "audiocraft") for name in own), (
                module
            )


def part_of(module: str) -> str:
    """The package or the top module that a module belongs to."""
    return module.removeprefix("musicgen_svc.").split(".")[0]


def test_the_engine_does_not_know_which_batch_it_has() -> None:
    """Only `factory.py` imports the two kinds of batch, and chooses one."""
    edges = graph()
    kinds = {f"musicgen_svc.engine.{name}" for name in ("ragged", "static")}
    assert kinds <= edges["musicgen_svc.engine.factory"]
    for module in edges.keys() - {"musicgen_svc.engine.factory"}:
        assert not edges[module] & kinds, module


def test_only_predict_knows_cog() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert not any(name.split(".")[0] in ("cog", "coglet") for name in imports(path)), path


def test_no_module_has_more_than_300_lines() -> None:
    for path in (*PACKAGE.rglob("*.py"), *PACKAGE.with_name("benchmarks").glob("*.py")):
        assert len(path.read_text().splitlines()) <= 300, f"split {path} by concept"


def test_the_top_of_the_package_shows_what_a_request_passes() -> None:
    shown = [path for path in PACKAGE.iterdir() if not path.name.startswith("_")]
    assert len(shown) <= 20, sorted(path.name for path in shown)
