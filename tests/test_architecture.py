"""The package's shape: imports point down, leaves know nothing, only the entry points know Cog."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "musicgen_svc"
LEAVES = {
    "errors", "ticks", "settings", "catalog", "request", "windows", "randomness", "storage", "loudness",
    "audio", "export", "compat", "chunked_encodec", "verification", "residency", "memory", "fair_queue",
    "meta", "locking", "chroma", "damage", "slices", "formats",
}  # fmt: skip
MAY_ANY_LEAF_IMPORT = {"engine.sampling_params", "errors", "ticks", "compat", "damage", "slices", "formats"}


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


def test_leaves_import_nothing_above_them() -> None:
    for module, below in graph().items():
        name = module.removeprefix("musicgen_svc.")
        if name in LEAVES:
            assert {b.removeprefix("musicgen_svc.") for b in below} <= MAY_ANY_LEAF_IMPORT, module


def test_the_engine_never_learns_which_batch_it_has() -> None:
    """Nor does one kind know of the other: `factory.py` alone chooses."""
    edges = graph()
    kinds = {f"musicgen_svc.engine.{name}" for name in ("ragged", "static")}
    assert kinds <= edges["musicgen_svc.engine.factory"]
    for module in edges.keys() - {"musicgen_svc.engine.factory"}:
        assert not edges[module] & kinds, module


def test_only_predict_knows_cog() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert not any(name.split(".")[0] in ("cog", "coglet") for name in imports(path)), path


def test_files_stay_readable() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 330, f"{path} is no longer one concept"
