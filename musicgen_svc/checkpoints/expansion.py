"""A stranger's configuration -> plain dictionaries, lists and scalars, within stated bounds.

A few hundred bytes can stand for more entries than any memory holds: an alias in YAML and a list that a
pickle refers to twice are one object in a file and two in what is made of it, and so is `${a}${a}`. Here
entries and characters are counted while they are made, and nothing else expands anything: what is returned
holds no reference, so that OmegaConf has none to follow.

Accepted are 100,000 entries, 1,000,000 characters in all, 64 levels and 256 KiB of YAML. audiocraft's own
configurations have some 600 entries on 6 levels, in 20 KB.
"""

import re
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig
from omegaconf.nodes import AnyNode

from musicgen_svc.errors import WeightsError, first_line

MAX_ENTRIES = 100_000
MAX_CHARACTERS = 1_000_000
MAX_DEPTH = 64
MAX_YAML_CHARACTERS = 256 << 10
MAX_SCALAR_CHARACTERS = 10_000
MAX_INTEGER_BITS = 256

_REFERENCE = re.compile(r"\$\{\s*([\w.\[\]-]+)\s*\}")
_UNRESOLVED = "\0unresolved"
_UNREADABLE = "{} holds a configuration that cannot be read: {}; download or copy the file again."


class Unreadable(ValueError):
    """The configuration exceeds a bound, refers to itself, or holds something else than plain values."""


def expanded(source: object, origin: str) -> dict[Any, Any]:
    """The configuration with every reference to another of its entries resolved.

    A reference that leads nowhere, and any other `${…}`, stays as it is; `inert` takes it apart.

    Args:
        source: a YAML string, OmegaConf's object or a plain dictionary.
        origin: the checkpoint's format and path, for messages.

    Raises:
        WeightsError: it is no mapping, exceeds a bound, or cannot be read.
    """
    try:
        plain = _Unwrapping().of(_parsed(source) if isinstance(source, str) else source)
        if isinstance(plain, dict):
            return _Resolving(plain).all()
    except KeyError as exc:  # of an object that a pickle restored by half
        raise WeightsError(_UNREADABLE.format(origin, f"it lacks {exc}")) from exc
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as exc:
        raise WeightsError(_UNREADABLE.format(origin, first_line(exc))) from exc
    raise WeightsError(_UNREADABLE.format(origin, f"it is a {type(plain).__name__}, not a mapping"))


def dangling(value: object) -> str | None:
    """The first text in an expanded configuration that still holds a reference."""
    if isinstance(value, str):
        return value if "${" in value else None
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((found for item in items if (found := dangling(item)) is not None), None)


def inert(value: Any) -> Any:
    """The same without the `$` of what is still a reference or a call: OmegaConf would follow it."""
    if isinstance(value, dict):
        return {key: inert(item) for key, item in value.items()}
    if isinstance(value, list):
        return [inert(item) for item in value]
    return value.replace("$", "") if isinstance(value, str) and "${" in value else value


class _Budget:
    """Counts what is made."""

    def __init__(self) -> None:
        self._entries = self._characters = 0

    def spend(self, value: object, depth: int) -> None:
        self._entries += 1
        if isinstance(value, str):
            self._characters += len(value)
        if self._entries > MAX_ENTRIES:
            raise Unreadable(f"it expands to more than {MAX_ENTRIES} entries")
        if self._characters > MAX_CHARACTERS:
            raise Unreadable(f"it expands to more than {MAX_CHARACTERS} characters")
        if depth > MAX_DEPTH:
            raise Unreadable(f"its entries are nested more than {MAX_DEPTH} levels deep")


def _parsed(text: str) -> object:
    if len(text) > MAX_YAML_CHARACTERS:
        raise Unreadable(f"it is YAML of {len(text)} characters; at most {MAX_YAML_CHARACTERS} are read")
    return yaml.load(text, _Loader)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML as OmegaConf reads it, without merge keys and overlong scalars.

    Aliases make shared objects, which are counted when they are copied; merge keys would be expanded here.
    """

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise Unreadable("it uses YAML's merge keys (<<), which are not read")

    def construct_scalar(self, node: Any) -> Any:
        if isinstance(node, yaml.ScalarNode) and len(node.value) > MAX_SCALAR_CHARACTERS:
            raise Unreadable(f"it holds a value of {len(node.value)} characters")
        return super().construct_scalar(node)


# Numbers such as 1e-5, which YAML 1.1 takes for text; and dates stay text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+|\d*\.\d+|\d+\.\d*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


class _Unwrapping:
    """OmegaConf's containers, which may come out of a pickle, as plain ones.

    None of their methods is called.
    """

    def __init__(self) -> None:
        self._budget = _Budget()

    def of(self, value: object, depth: int = 0) -> Any:
        self._budget.spend(value, depth)
        if isinstance(value, DictConfig | ListConfig):
            return self._container(value.__dict__["_content"], depth)
        if isinstance(value, AnyNode):
            return self.of(value.__dict__["_val"], depth + 1)
        return self._container(value, depth)

    def _container(self, value: object, depth: int) -> Any:
        if isinstance(value, dict):
            return {self._key(key): self.of(item, depth + 1) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.of(item, depth + 1) for item in value]
        return self._scalar(value)

    def _key(self, key: object) -> object:
        if not isinstance(key, str | int | float):
            raise Unreadable(f"it has a {type(key).__name__} for a name")
        self._budget.spend(key, 0)
        return key

    def _scalar(self, value: object) -> object:
        if isinstance(value, int) and value.bit_length() > MAX_INTEGER_BITS:
            raise Unreadable(f"it holds an integer of {value.bit_length()} bits")
        if value is None or isinstance(value, str | int | float):
            return value
        raise Unreadable(f"it holds a {type(value).__name__}")


class _Resolving:
    """References to other entries, `${a.b[0]}` from the top and `${..b}` from where they stand."""

    def __init__(self, root: dict[Any, Any]) -> None:
        self._root, self._budget = root, _Budget()
        self._following: list[tuple[Any, ...]] = []

    def all(self) -> dict[Any, Any]:
        return {key: self._of(item, (key,)) for key, item in self._root.items()}

    def _of(self, value: Any, path: tuple[Any, ...]) -> Any:
        """`path`: where the value stands, which relative references count from."""
        self._budget.spend(value, len(path) + len(self._following))
        if isinstance(value, dict):
            return {key: self._of(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [self._of(item, (*path, index)) for index, item in enumerate(value)]
        if not isinstance(value, str) or "${" not in value:
            return value
        if whole := _REFERENCE.fullmatch(value):
            found = self._follow(whole[1], path)
            return value if found is _UNRESOLVED else found
        if _REFERENCE.sub("", value).count("${") or "\\$" in value:
            return value  # a call, a reference inside a reference, or an escaped one
        return self._joined(value, path)

    def _joined(self, value: str, path: tuple[Any, ...]) -> str:
        pieces: list[str] = []
        at = 0
        for match in _REFERENCE.finditer(value):
            found = self._follow(match[1], path)
            if found is _UNRESOLVED or isinstance(found, dict | list):
                return value
            pieces += [value[at : match.start()], str(found)]
            at = match.end()
            self._budget.spend(pieces[-1], 0)
        return "".join([*pieces, value[at:]])

    def _follow(self, reference: str, path: tuple[Any, ...]) -> Any:
        target = _steps(reference, path)
        node: Any = self._root
        for index, step in enumerate(target):
            if isinstance(node, str) and (through := _REFERENCE.fullmatch(node)):
                node = self._follow(through[1], target[:index])
            node = _child(node, step)
            if node is _UNRESOLVED:
                return node
        if target in self._following:
            raise Unreadable(f"its entry {'.'.join(map(str, target))[:80]} refers to itself")
        self._following.append(target)
        try:
            return self._of(node, target)
        finally:
            self._following.pop()


def _steps(reference: str, path: tuple[Any, ...]) -> tuple[Any, ...]:
    """`a.b[0]` as the steps from the top.

    One leading dot is the container of the value that the reference stands in, each more is its parent.
    """
    up = len(reference) - len(reference.lstrip("."))
    start = path[: max(0, len(path) - up)] if up else ()
    names = re.findall(r"[^.\[\]]+", reference)
    return (*start, *names)


def _child(node: Any, step: Any) -> Any:
    if isinstance(node, dict):
        found = node.get(step, _UNRESOLVED)
        if found is _UNRESOLVED and isinstance(step, str) and step.isdecimal():
            found = node.get(int(step[:9]), _UNRESOLVED)
        return found
    if isinstance(node, list) and str(step).isdecimal() and int(str(step)[:9]) < len(node):
        return node[int(str(step)[:9])]
    return _UNRESOLVED
