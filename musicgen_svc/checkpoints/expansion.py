"""Expands an untrusted configuration into plain dictionaries, lists and scalars, within stated bounds.

A few hundred bytes can expand to more entries than fit into any memory: a YAML alias, a list to which a
pickle refers twice, and the reference in `${a}${a}` are each one object in the file and two in the result.
Therefore entries and characters are counted while they are made. OmegaConf would not count them, so no
reference is left for OmegaConf to follow: `expand` resolves them, and `without_references` disables the rest.

Accepted are 100,000 entries, 1,000,000 characters in all, 64 levels and 256 KiB of YAML. audiocraft's own
configurations have about 600 entries on 6 levels, in 20 KB.
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
_NOT_FOUND = "\0not found"


class _ExpansionError(ValueError):
    """The configuration exceeds a bound, refers to itself, or holds something else than plain values."""


def unreadable_config(origin: str, reason: str) -> WeightsError:
    """The error for a configuration that cannot be read.

    Args:
        origin: the checkpoint's format and path.
        reason: a clause without a full stop.
    """
    return WeightsError(
        f"{origin} holds a configuration that cannot be read: {reason}; download or copy the file again."
    )


def expand(source: object, origin: str) -> dict[Any, Any]:
    """The configuration as plain values, with every reference to another of its entries resolved.

    A reference to an entry that does not exist, and any other `${…}`, stays as it is; `without_references`
    disables it.

    Args:
        source: a YAML string, OmegaConf's object or a plain dictionary.
        origin: the checkpoint's format and path, for messages.

    Raises:
        WeightsError: it is not a mapping, exceeds a bound, or cannot be read.
    """
    try:
        plain = _Unwrapper().unwrap(_parse_yaml(source) if isinstance(source, str) else source)
        if isinstance(plain, dict):
            return _Resolver(plain).resolve_all()
    except KeyError as exc:  # a pickle may restore an object without all of its attributes
        raise unreadable_config(origin, f"it lacks {exc}") from exc
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as exc:
        raise unreadable_config(origin, first_line(exc)) from exc
    raise unreadable_config(origin, f"it is a {type(plain).__name__}, not a mapping")


def first_reference(value: object) -> str | None:
    """The first text in an expanded configuration that still holds a reference; None if there is none."""
    if isinstance(value, str):
        return value if "${" in value else None
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((found for item in items if (found := first_reference(item)) is not None), None)


def without_references(value: Any) -> Any:
    """Returns an expanded value, without the `$` of each text that OmegaConf would still follow or call."""
    if isinstance(value, dict):
        return {key: without_references(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_references(item) for item in value]
    return value.replace("$", "") if isinstance(value, str) and "${" in value else value


class _Budget:
    """Counts entries, characters and levels, and fails when there are too many."""

    def __init__(self) -> None:
        self._entries = self._characters = 0

    def spend(self, value: object, depth: int) -> None:
        """Counts one value at a depth.

        Raises:
            _ExpansionError: a bound is exceeded.
        """
        self._entries += 1
        if isinstance(value, str):
            self._characters += len(value)
        if self._entries > MAX_ENTRIES:
            raise _ExpansionError(f"it expands to more than {MAX_ENTRIES} entries")
        if self._characters > MAX_CHARACTERS:
            raise _ExpansionError(f"it expands to more than {MAX_CHARACTERS} characters")
        if depth > MAX_DEPTH:
            raise _ExpansionError(f"its entries are nested more than {MAX_DEPTH} levels deep")


def _parse_yaml(text: str) -> object:
    """The value of a YAML text, in which aliases are shared objects."""
    if len(text) > MAX_YAML_CHARACTERS:
        raise _ExpansionError(f"it is YAML of {len(text)} characters; at most {MAX_YAML_CHARACTERS} are read")
    return yaml.load(text, _Loader)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Loads YAML as OmegaConf does, but refuses merge keys and very long scalars.

    An alias becomes another reference to one object, whose entries are counted when `_Unwrapper` copies it.
    A merge key is refused, because PyYAML itself would copy the entries, and would not count them.
    """

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise _ExpansionError("it uses YAML's merge keys (<<), which are not read")

    def construct_scalar(self, node: Any) -> Any:
        if isinstance(node, yaml.ScalarNode) and len(node.value) > MAX_SCALAR_CHARACTERS:
            raise _ExpansionError(f"it holds a value of {len(node.value)} characters")
        return super().construct_scalar(node)


# OmegaConf reads 1e-5 as a number and a date as a text. PyYAML follows YAML 1.1: there 1e-5 is a text and a
# date is a date.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+|\d*\.\d+|\d+\.\d*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


class _Unwrapper:
    """Copies OmegaConf's containers, which may come from a pickle, to plain ones.

    It calls no methods of these objects, because a pickle may have set any attribute.
    """

    def __init__(self) -> None:
        self._budget = _Budget()

    def unwrap(self, value: object, depth: int = 0) -> Any:
        """The plain value of an entry at a depth."""
        self._budget.spend(value, depth)
        if isinstance(value, DictConfig | ListConfig):
            return self._container(value.__dict__["_content"], depth)
        if isinstance(value, AnyNode):
            return self.unwrap(value.__dict__["_val"], depth + 1)
        return self._container(value, depth)

    def _container(self, value: object, depth: int) -> Any:
        if isinstance(value, dict):
            return {self._key(key): self.unwrap(item, depth + 1) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.unwrap(item, depth + 1) for item in value]
        return self._scalar(value)

    def _key(self, key: object) -> object:
        if not isinstance(key, str | int | float):
            raise _ExpansionError(f"it has a {type(key).__name__} for a name")
        self._budget.spend(key, 0)
        return key

    def _scalar(self, value: object) -> object:
        if isinstance(value, int) and value.bit_length() > MAX_INTEGER_BITS:
            raise _ExpansionError(f"it holds an integer of {value.bit_length()} bits")
        if value is None or isinstance(value, str | int | float):
            return value
        raise _ExpansionError(f"it holds a {type(value).__name__}")


class _Resolver:
    """Resolves references: `${a.b[0]}` starts from the top, `${..b}` from the entry that holds it."""

    def __init__(self, root: dict[Any, Any]) -> None:
        self._root, self._budget = root, _Budget()
        self._following: list[tuple[Any, ...]] = []

    def resolve_all(self) -> dict[Any, Any]:
        """The whole configuration, resolved."""
        return {key: self._resolve(item, (key,)) for key, item in self._root.items()}

    def _resolve(self, value: Any, path: tuple[Any, ...]) -> Any:
        """The resolved value of the entry at `path`, from which relative references start."""
        self._budget.spend(value, len(path) + len(self._following))
        if isinstance(value, dict):
            return {key: self._resolve(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [self._resolve(item, (*path, index)) for index, item in enumerate(value)]
        if not isinstance(value, str) or "${" not in value:
            return value
        if whole := _REFERENCE.fullmatch(value):
            found = self._follow(whole[1], path)
            return value if found is _NOT_FOUND else found
        if _REFERENCE.sub("", value).count("${") or "\\$" in value:
            return value  # a call, a reference inside a reference, or an escaped one
        return self._interpolate(value, path)

    def _interpolate(self, value: str, path: tuple[Any, ...]) -> str:
        """The text with each of its references replaced; unchanged if one has no value that is a scalar."""
        pieces: list[str] = []
        end = 0
        for match in _REFERENCE.finditer(value):
            found = self._follow(match[1], path)
            if found is _NOT_FOUND or isinstance(found, dict | list):
                return value
            pieces += [value[end : match.start()], str(found)]
            end = match.end()
            self._budget.spend(pieces[-1], 0)
        return "".join([*pieces, value[end:]])

    def _follow(self, reference: str, path: tuple[Any, ...]) -> Any:
        """The resolved value that a reference in the entry at `path` means, or `_NOT_FOUND`.

        Raises:
            _ExpansionError: the entry refers to itself, or a bound is exceeded.
        """
        target = _steps(reference, path)
        node: Any = self._root
        for index, step in enumerate(target):
            if isinstance(node, str) and (through := _REFERENCE.fullmatch(node)):
                node = self._follow(through[1], target[:index])
            node = _child(node, step)
            if node is _NOT_FOUND:
                return node
        if target in self._following:
            raise _ExpansionError(f"its entry {'.'.join(map(str, target))[:80]} refers to itself")
        self._following.append(target)
        try:
            return self._resolve(node, target)
        finally:
            self._following.pop()


def _steps(reference: str, path: tuple[Any, ...]) -> tuple[Any, ...]:
    """The keys and indices that lead from the top to what a reference such as `a.b[0]` means.

    One leading dot means the container of the entry at `path`; each further dot means the next parent.
    """
    up = len(reference) - len(reference.lstrip("."))
    start = path[: max(0, len(path) - up)] if up else ()
    names = re.findall(r"[^.\[\]]+", reference)
    return (*start, *names)


def _child(node: Any, step: Any) -> Any:
    """The entry of a dictionary or list under a key or index, or `_NOT_FOUND`."""
    if isinstance(node, dict):
        found = node.get(step, _NOT_FOUND)
        if found is _NOT_FOUND and isinstance(step, str) and step.isdecimal():
            found = node.get(int(step[:9]), _NOT_FOUND)
        return found
    if isinstance(node, list) and str(step).isdecimal() and int(str(step)[:9]) < len(node):
        return node[int(str(step)[:9])]
    return _NOT_FOUND
