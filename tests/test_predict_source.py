"""predict.py's text is the contract, in the narrow Python that Cog's parser understands.

Cog reads the inputs out of the source and drops, garbles or makes required what it does not
understand, mostly without a word. `violations` knows those rules; it is tried on bad sources first.
"""

import ast
import io
import tokenize
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = (ROOT / "predict.py").read_text()

TYPES = {"str", "int", "float", "bool", "Path"}
COG_NAMES = {"BaseRunner", "Input", "Path"}

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


def run_method(source: str) -> ast.FunctionDef | ast.AsyncFunctionDef:
    predictor = next(node for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    return next(
        node
        for node in predictor.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == "run"
    )


def options(call: ast.expr) -> dict[str, ast.expr]:
    assert isinstance(call, ast.Call)
    return {str(keyword.arg): keyword.value for keyword in call.keywords}


def violations(source: str) -> list[str]:
    """What Cog's parser would not take as it is meant, one entry each."""
    found = []
    imported = {
        alias.asname or alias.name
        for node in ast.parse(source).body
        if isinstance(node, ast.ImportFrom) and node.module == "cog"
        for alias in node.names
    }
    if not imported >= COG_NAMES:
        found.append("BaseRunner, Input and Path must be imported from cog by their names")
    run = run_method(source)
    if run.returns is None or ast.unparse(run.returns) != "Path":
        found.append("run must be annotated to return Path")
    parameters = run.args.args[1:]
    if run.args.kwonlyargs or run.args.vararg or run.args.kwarg or run.args.posonlyargs:
        found.append("run takes plain parameters only")
    if len(run.args.defaults) != len(parameters):
        found.append("every parameter needs an Input")
    for parameter, call in zip(parameters, run.args.defaults, strict=False):
        found += [f"{parameter.arg}: {what}" for what in _input_violations(source, parameter, call)]
    return found


def _input_violations(source: str, parameter: ast.arg, call: ast.expr) -> list[str]:
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "Input"):
        return ["the default must be a call of Input by that name"]
    found = []
    kind = ast.unparse(parameter.annotation) if parameter.annotation else ""
    if kind.removesuffix(" | None") not in TYPES:
        found.append(f"type {kind!r}")
    if call.args:
        found.append("a positional argument")
    for keyword in call.keywords:
        written = ast.get_source_segment(source, keyword) or ""
        value = ast.get_source_segment(source, keyword.value) or ""
        if written.replace(" ", "") != f"{keyword.arg}={value}".replace(" ", ""):
            found.append(f"{keyword.arg} is parenthesised")
        rule = {
            "default": _is_literal,
            "description": lambda node, value=value: _is_plain_text(node, value),
            "choices": _is_literal_list,
            "ge": _is_number,
            "le": _is_number,
        }.get(str(keyword.arg))
        if rule is None:
            found.append(f"{keyword.arg} is not among the options that are understood")
        elif not rule(keyword.value):
            found.append(f"{keyword.arg} is not a plain literal")
    if found:
        return found
    return _value_violations(kind, {name: ast.literal_eval(node) for name, node in options(call).items()})


def _value_violations(kind: str, values: dict[str, Any]) -> list[str]:
    """Nobody checks these: neither the build nor the server."""
    if not {"default", "description"} <= values.keys():
        return ["default and description must be given"]
    default = values["default"]
    if default is None:
        return [] if kind.endswith(" | None") else ["None is the default of a type that is not Optional"]
    python = {"str": str, "int": int, "float": (int, float), "bool": bool}.get(kind.removesuffix(" | None"))
    found = []
    if python is None or not isinstance(default, python) or isinstance(default, bool) != (kind == "bool"):
        found.append("the default has another type")
    elif default not in values.get("choices", [default]):
        found.append("the default is no choice")
    elif default < values.get("ge", default) or default > values.get("le", default):
        found.append("the default is out of bounds")
    return found


def _is_literal(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) or _is_number(node)


def _is_number(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node = node.operand
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


def _is_literal_list(node: ast.expr) -> bool:
    return isinstance(node, ast.List) and all(isinstance(item, ast.Constant) for item in node.elts)


def _is_plain_text(node: ast.expr, written: str) -> bool:
    """One string token without prefix and escapes: two beside each other look like one in the tree."""
    tokens = [
        token for token in tokenize.generate_tokens(io.StringIO(written).readline) if token.string.strip()
    ]
    return isinstance(node, ast.Constant) and len(tokens) == 1 and written[0] in "\"'" and "\\" not in written


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
    assert violations(GOOD) == []


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
    assert any(found.startswith(violation) for found in violations(GOOD.replace(good, bad, 1)))


def test_predict_py_breaks_no_rule() -> None:
    assert violations(SOURCE) == []


def test_the_inputs_are_those_of_the_contract_in_its_order() -> None:
    arguments = run_method(SOURCE).args
    inputs = {}
    for parameter, call in zip(arguments.args[1:], arguments.defaults, strict=True):
        assert parameter.annotation
        values = {
            name: ast.literal_eval(node) for name, node in options(call).items() if name != "description"
        }
        inputs[parameter.arg] = (ast.unparse(parameter.annotation), values)
    assert inputs == CONTRACT
    assert list(inputs) == list(CONTRACT)


def test_every_field_is_passed_on_under_its_own_name() -> None:
    fields = next(node for node in ast.walk(run_method(SOURCE)) if isinstance(node, ast.Dict))
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
    assert imported == {"os", "cog"}
