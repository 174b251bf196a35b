"""Reads the inputs of the service from the text of predict.py, as `cog build` does.

Cog's parser understands only simple literals and annotations. It drops or garbles everything else, or makes
the input required, mostly without a message. Here all that is an error.
"""

import ast
import io
import tokenize
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

TYPES = ("str", "int", "float", "bool", "Path")
OUTPUT_TYPE = "Path"
COG_NAMES = {"BaseRunner", "Input", "Path"}
"""Names that Cog recognises only if they are imported by these very names."""


class SourceError(Exception):
    """predict.py holds something that Cog's parser does not understand. The message is one sentence."""


@dataclass(frozen=True)
class InputField:
    """One input of the service."""

    name: str
    type: str
    """One of TYPES."""
    nullable: bool
    options: dict[str, Any]
    """Keyword arguments of `Input`: `default` and `description`, and perhaps `choices`, `ge` and `le`."""


def read_inputs(source: str) -> list[InputField]:
    """Reads the inputs in their order.

    Args:
        source: the text of predict.py.

    Raises:
        SourceError: Cog would not understand it, or not as it is meant.
    """
    tree = ast.parse(source)
    imported = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module == "cog"
        for alias in node.names
    }
    if not imported >= COG_NAMES:
        raise SourceError("BaseRunner, Input and Path must be imported from cog by their names.")
    run = run_method(tree)
    if run.returns is None or ast.unparse(run.returns) != OUTPUT_TYPE:
        raise SourceError(f"run must be annotated to return {OUTPUT_TYPE}.")
    if run.args.kwonlyargs or run.args.vararg or run.args.kwarg or run.args.posonlyargs:
        raise SourceError("run must have plain parameters only.")
    parameters = run.args.args[1:]  # without self
    if len(run.args.defaults) != len(parameters):
        raise SourceError("every parameter of run needs a default: = Input(default=...).")
    return [
        _input_field(source, parameter, call)
        for parameter, call in zip(parameters, run.args.defaults, strict=True)
    ]


def run_method(tree: ast.Module) -> ast.FunctionDef | ast.AsyncFunctionDef:
    """Finds `Predictor.run`.

    Raises:
        SourceError: there is none.
    """
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == "Predictor":
            for member in node.body:
                if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef) and member.name == "run":
                    return member
    raise SourceError("there is no class Predictor with a method run.")


def _input_field(source: str, parameter: ast.arg, call: ast.expr) -> InputField:
    """Reads one parameter of `run` and its `Input(...)`."""
    name = parameter.arg
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "Input"):
        raise SourceError(f"{name}: the default must be a call of Input by that name.")
    annotation = ast.unparse(parameter.annotation) if parameter.annotation else ""
    kind = annotation.removesuffix(" | None")
    if kind not in TYPES:
        raise SourceError(
            f"{name}: type {annotation!r} is not one of {', '.join(TYPES)}, perhaps with | None."
        )
    if call.args:
        raise SourceError(f"{name}: a positional argument of Input must become a keyword.")
    for keyword in call.keywords:
        _check_literal(source, name, keyword)
    options = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    field = InputField(name, kind, kind != annotation, options)
    _check_default(field)
    return field


def _check_literal(source: str, name: str, keyword: ast.keyword) -> None:
    """Checks that an option of an input is written as one plain literal."""
    rules: dict[str, Callable[[ast.expr, str], bool]] = {
        "default": lambda node, written: isinstance(node, ast.Constant) or _is_number(node),
        "description": _is_plain_text,
        "choices": lambda node, written: _is_literal_list(node),
        "ge": lambda node, written: _is_number(node),
        "le": lambda node, written: _is_number(node),
    }
    option = str(keyword.arg)
    written = ast.get_source_segment(source, keyword) or ""
    value = ast.get_source_segment(source, keyword.value) or ""
    if option not in rules:
        raise SourceError(f"{name}: {option} is not among the options {', '.join(rules)}.")
    if written.replace(" ", "") != f"{option}={value}".replace(" ", ""):
        raise SourceError(f"{name}: {option} is parenthesised: remove the parentheses.")
    if not rules[option](keyword.value, value):
        raise SourceError(f"{name}: {option} is not a plain literal.")


def _check_default(field: InputField) -> None:
    """Checks that the default is a value of the input, which neither Cog's build nor its server does."""
    options, name = field.options, field.name
    if not {"default", "description"} <= options.keys():
        raise SourceError(f"{name}: default and description must be given.")
    default = options["default"]
    if default is None:
        if not field.nullable:
            raise SourceError(f"{name}: None is the default of a type that is not Optional.")
        return
    classes = {"str": str, "int": int, "float": (int, float), "bool": bool}
    python: Any = classes.get(field.type)
    is_bool = isinstance(default, bool)
    if python is None or not isinstance(default, python) or is_bool != (field.type == "bool"):
        raise SourceError(f"{name}: the default has another type than {field.type}.")
    if default not in options.get("choices", [default]):
        raise SourceError(f"{name}: the default is no choice.")
    if default < options.get("ge", default) or default > options.get("le", default):
        raise SourceError(f"{name}: the default is out of bounds.")


def _is_number(node: ast.expr) -> bool:
    """Whether a node is a number, perhaps with a minus sign."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node = node.operand
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


def _is_literal_list(node: ast.expr) -> bool:
    """Whether a node is a list of literals."""
    return isinstance(node, ast.List) and all(isinstance(item, ast.Constant) for item in node.elts)


def _is_plain_text(node: ast.expr, written: str) -> bool:
    """Whether a node is written as one string without prefix and escapes.

    The tokens are counted because two strings beside each other are one constant in the tree.
    """
    tokens = [
        token for token in tokenize.generate_tokens(io.StringIO(written).readline) if token.string.strip()
    ]
    return isinstance(node, ast.Constant) and len(tokens) == 1 and written[0] in "\"'" and "\\" not in written
