"""predict.py is the contract, and is written in the narrow Python that Cog's parser understands."""

import ast
from typing import Any

import pytest

from musicgen_svc.cli.predict_source import SourceError, read_inputs, run_method
from tests.cli.repository import ROOT

SOURCE = (ROOT / "predict.py").read_text()

CONTRACT: dict[str, tuple[str, dict[str, Any]]] = {
    "model_version": (
        "str",
        {
            "default": "finetuned",
            "choices": ["melody", "small", "medium", "large", "encode-decode", "finetuned"],
        },
    ),
    "prompt": ("str | None", {"default": None}),
    "input_audio": ("Path | None", {"default": None}),
    "duration": ("int", {"default": 8, "ge": 1, "le": 600}),
    "continuation": ("bool", {"default": False}),
    "continuation_start": ("int", {"default": 0, "ge": 0}),
    "continuation_end": ("int | None", {"default": None, "ge": -1}),
    "multi_band_diffusion": ("bool", {"default": False}),
    "normalization_strategy": (
        "str",
        {"default": "loudness", "choices": ["loudness", "clip", "peak", "rms"]},
    ),
    "top_k": ("int", {"default": 250, "ge": 0}),
    "top_p": ("float", {"default": 0, "ge": 0, "le": 1}),
    "temperature": ("float", {"default": 1, "ge": 0, "le": 10}),
    "classifier_free_guidance": ("int", {"default": 3, "ge": 0, "le": 20}),
    "output_format": ("str", {"default": "wav", "choices": ["wav", "mp3"]}),
    "seed": ("int | None", {"default": None, "ge": -1, "le": 4294967295}),
}


GOOD = """
from cog import BaseRunner, Input, Path


class Predictor(BaseRunner):
    async def run(
        self,
        mode: str = Input(default="a", choices=["a", "b"], description="Mode."),
        level: float = Input(default=0.5, ge=0, le=1, description="Level."),
        seed: int | None = Input(default=None, ge=-1, description="Seed."),
    ) -> Path: ...
"""


def test_a_good_source_breaks_no_rule() -> None:
    assert [field.name for field in read_inputs(GOOD)] == ["mode", "level", "seed"]


@pytest.mark.parametrize(
    ("good", "bad", "violation"),
    [
        ("seed: int | None", "seed: int", "seed: None is the default of a type that is not Optional"),
        ("default=0.5", "0.5", "level: a positional argument"),
        ("default=0.5", "default=LEVEL", "level: default is not a plain literal"),
        ("default=0.5", "default=2 * 4", "level: default is not a plain literal"),
        ("default=0.5", "default=(0.5)", "level: default is parenthesised"),
        ("le=1", "le=HIGHEST", "level: le is not a plain literal"),
        ("ge=-1", "ge=LOWEST", "seed: ge is not a plain literal"),
        ('"Level."', 'f"Level {1}."', "level: description is not a plain literal"),
        ('"Level."', '("Level.")', "level: description is parenthesised"),
        ('"Level."', '"Lev" "el."', "level: description is not a plain literal"),
        ('"Level."', '"Lev" + "el."', "level: description is not a plain literal"),
        ('"Level."', '"Level.\\n"', "level: description is not a plain literal"),
        ('"Level."', 'r"Level."', "level: description is not a plain literal"),
        ('["a", "b"]', "CHOICES", "mode: choices is not a plain literal"),
        ('["a", "b"]', 'list("ab")', "mode: choices is not a plain literal"),
        ("mode: str", 'mode: Literal["a", "b"]', "mode: type \"Literal['a', 'b']\""),
        ("mode: str", "mode: Mode", "mode: type 'Mode'"),
        ("mode: str", "mode", "mode: type ''"),
        ("default=0.5", "default_factory=float", "level: default_factory is not among"),
        (" -> Path", "", "run must be annotated to return Path"),
        ("-> Path", "-> Path | None", "run must be annotated to return Path"),
        ("= Input(default=0.5", "= cog.Input(default=0.5", "level: the default must be a call of Input"),
        ("import BaseRunner, Input, Path", "import BaseRunner, Input", "BaseRunner, Input and Path must"),
        ('default="a"', 'default="c"', "mode: the default is no choice"),
        ("default=0.5", "default=2", "level: the default is out of bounds"),
        ("default=0.5", "default=True", "level: the default has another type"),
        (', description="Level."', "", "level: default and description must be given"),
    ],
)  # fmt: skip
def test_every_rule_finds_what_breaks_it(good: str, bad: str, violation: str) -> None:
    assert good in GOOD
    with pytest.raises(SourceError) as caught:
        read_inputs(GOOD.replace(good, bad, 1))
    assert str(caught.value).startswith(violation)


def test_the_inputs_are_those_of_the_contract_in_its_order() -> None:
    inputs = {}
    for field in read_inputs(SOURCE):
        options = {name: value for name, value in field.options.items() if name != "description"}
        inputs[field.name] = (field.type + (" | None" if field.nullable else ""), options)
    assert inputs == CONTRACT
    assert list(inputs) == list(CONTRACT)


def test_every_field_is_passed_on_under_its_own_name() -> None:
    fields = next(node for node in ast.walk(run_method(ast.parse(SOURCE))) if isinstance(node, ast.Dict))
    passed = {
        key.value: value.id
        for key, value in zip(fields.keys, fields.values, strict=True)
        if isinstance(key, ast.Constant) and isinstance(value, ast.Name)
    }
    assert passed == {name: name for name in CONTRACT}


def test_predict_py_is_short_and_imports_nothing_heavy() -> None:
    assert len(SOURCE.splitlines()) < 150
    imported = {
        alias.name if isinstance(node, ast.Import) else node.module
        for node in ast.parse(SOURCE).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert imported == {"os", "collections.abc", "cog"}
