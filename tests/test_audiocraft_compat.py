"""audiocraft_compat.py is needed and sufficient, and the only module that imports audiocraft."""

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PACKAGE = Path(__file__).parent.parent / "musicgen_svc"


WITHOUT = """
import sys
from musicgen_svc import audiocraft_compat as compat

for name in compat.STAND_INS:
    names = [m for m in sys.modules if m.split(".")[0] == name]
    assert names, name
    taken = {m: sys.modules.pop(m) for m in names}
    for module in [m for m in sys.modules if m.split(".")[0] == "audiocraft"]:
        del sys.modules[module]
    try:
        import audiocraft.models
    except ModuleNotFoundError as missing:
        print(missing.name)
    sys.modules |= taken
"""


def test_each_stand_in_is_still_needed() -> None:
    shown = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT], capture_output=True, text=True, check=True
    )
    assert shown.stdout.split() == ["xformers", "spacy"], "audiocraft imports without it: drop its stand-in"


def test_the_constant_names_every_stand_in() -> None:
    from musicgen_svc import audiocraft_compat as compat

    made = {
        n.split(".")[0]
        for n, m in sys.modules.items()
        if str(vars(m).get("__doc__")).startswith("Stand-in for")
    }
    assert made == set(compat.STAND_INS)


FACTS = """
import json, sys
from pathlib import Path
import num2words
from musicgen_svc import audiocraft_compat as compat

facts = {
    "there": [n for n in compat.DELAYED if n in sys.modules and n != "num2words"],
    "kept": sys.modules["num2words"] is num2words,
}
from musicgen_svc.service import Service
from musicgen_svc.settings import Settings

weights = Path(sys.argv[1])
Service(Settings(weights_dir=weights, device="cpu")).start(str(weights / "melody"))
heavy = (
    "audiocraft.solvers", "demucs", "flashy", "librosa", "requests", "scipy", "sympy", "torch._dynamo",
    "transformers.modeling_utils",
)
facts["heavy"] = [name for name in heavy if name in sys.modules]
import librosa.filters, transformers
from audiocraft.models import encodec
from audiocraft.modules import chroma, conditioners
from audiocraft.utils import utils

facts |= {
    "librosa": chroma.filters.chroma is librosa.filters.chroma,
    "transformers": encodec.HFEncodecModel.from_pretrained == transformers.EncodecModel.from_pretrained,
    "num2words": conditioners.num2words(21),
    "flashy": utils.flashy.distrib.world_size(),
    "types": sorted({type(sys.modules[n]).__module__ for n in compat.DELAYED}),
}
import audiocraft, audiocraft.data, audiocraft.models
from audiocraft.models import MultiBandDiffusion, MusicGen, builders

facts |= {
    "models": [MusicGen.__module__, MultiBandDiffusion.__module__],
    "same": builders is compat.builders and audiocraft.models.LMModel is compat.LMModel,
    "version": audiocraft.__version__,
    "data": audiocraft.data.music_dataset.MusicDataset.__name__,
    "nothing": hasattr(audiocraft, "nothing"),
}
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def facts(weights: Path) -> dict[str, Any]:
    """The facts that a new process prints."""
    command = [sys.executable, "-W", "ignore", "-c", FACTS, str(weights)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, Any] = json.loads(shown.splitlines()[-1])
    return found


def test_delayed_packages_are_not_imported(facts: dict[str, Any]) -> None:
    assert facts["there"] == []


def test_a_melody_model_loads_without_packages_that_it_does_not_need(facts: dict[str, Any]) -> None:
    """Their imports would double the time of the start."""
    assert facts["heavy"] == []


def test_a_delayed_name_is_the_real_one_when_it_is_used_and_no_stand_in_remains(
    facts: dict[str, Any],
) -> None:
    assert facts["kept"], "a package that was imported before must stay the same"
    assert (facts["librosa"], facts["transformers"]) == (True, True)
    assert (facts["num2words"], facts["flashy"]) == ("twenty-one", 1)
    assert "musicgen_svc.audiocraft_compat" not in facts["types"]


def test_all_other_names_of_audiocraft_can_be_imported(facts: dict[str, Any]) -> None:
    assert facts["models"] == ["audiocraft.models.musicgen", "audiocraft.models.multibanddiffusion"]
    assert facts["same"] and not facts["nothing"]
    assert (facts["version"], facts["data"]) == ("1.3.0", "MusicDataset")


def test_only_one_module_imports_audiocraft() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.name == "audiocraft_compat.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(n.split(".")[0] == "audiocraft" for n in names), path
