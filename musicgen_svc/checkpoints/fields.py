"""Kinds of values that a field of a configuration may have, and the check of a section against its table.

The tables themselves are in `known_fields.py`. A table maps a field's name to its kind; a field that is
absent and `required` is an error, a field with a `default` gets it, and any other field may be left out.
This file knows no model.
"""

import reprlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeAlias

from musicgen_svc.errors import WeightsError

_ABSENT = object()
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60
_MAX_SHOWN_INTEGER = 10**40


class Kind(ABC):
    """A set of values, and how a message describes it."""

    @abstractmethod
    def accepts(self, value: object) -> bool:
        """Whether the value belongs to it."""

    @abstractmethod
    def __str__(self) -> str:
        """The words after "it must be"."""


@dataclass(frozen=True)
class Whole(Kind):
    """An integer from `low` to `high`."""

    low: int
    high: int

    def accepts(self, value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and self.low <= value <= self.high

    def __str__(self) -> str:
        return f"an integer from {self.low} to {self.high}"


@dataclass(frozen=True)
class Real(Kind):
    """A number from `low` to `high`, integers and fractions included; never NaN."""

    low: float
    high: float
    above: bool = False
    """Whether `low` itself is excluded."""

    def accepts(self, value: object) -> bool:
        if not isinstance(value, int | float | Fraction) or isinstance(value, bool):
            return False
        return self.low <= value <= self.high and not (self.above and value == self.low)

    def __str__(self) -> str:
        low = f"above {self.low:g} and up" if self.above else f"from {self.low:g}"
        return f"a number {low} to {self.high:g}"


@dataclass(frozen=True)
class Flag(Kind):
    """True or false, or 1 or 0 in their place."""

    def accepts(self, value: object) -> bool:
        return isinstance(value, bool) or (isinstance(value, int) and value in (0, 1))

    def __str__(self) -> str:
        return "true or false"


@dataclass(frozen=True)
class Text(Kind):
    """A string of at most `most` characters."""

    most: int = 1000

    def accepts(self, value: object) -> bool:
        return isinstance(value, str) and len(value) <= self.most

    def __str__(self) -> str:
        return f"a text of at most {self.most} characters"


class OneOf(Kind):
    """One of a few strings."""

    def __init__(self, *values: str) -> None:
        self._values = values

    def accepts(self, value: object) -> bool:
        return isinstance(value, str) and value in self._values

    def __str__(self) -> str:
        quoted = [repr(value) for value in self._values]
        return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} or {quoted[-1]}"


@dataclass(frozen=True)
class Items(Kind):
    """A list of `least` to `most` values of one kind."""

    kind: Kind
    least: int
    most: int

    def accepts(self, value: object) -> bool:
        return (
            isinstance(value, list | tuple)
            and self.least <= len(value) <= self.most
            and all(self.kind.accepts(item) for item in value)
        )

    def __str__(self) -> str:
        return f"a list of {self.least} to {self.most} values, each {self.kind}"


@dataclass(frozen=True)
class Entries(Kind):
    """A mapping of names to at most `most` values of one kind."""

    kind: Kind
    most: int

    def accepts(self, value: object) -> bool:
        return (
            isinstance(value, Mapping)
            and len(value) <= self.most
            and all(isinstance(name, str) and self.kind.accepts(item) for name, item in value.items())
        )

    def __str__(self) -> str:
        return f"a mapping of at most {self.most} names to values, each {self.kind}"


class Either(Kind):
    """A value of one of several kinds."""

    def __init__(self, *kinds: Kind) -> None:
        self._kinds = kinds

    def accepts(self, value: object) -> bool:
        return any(kind.accepts(value) for kind in self._kinds)

    def __str__(self) -> str:
        return " or ".join(str(kind) for kind in self._kinds)


class Nothing(Kind):
    """Null."""

    def accepts(self, value: object) -> bool:
        return value is None

    def __str__(self) -> str:
        return "null"


class Ignored(Kind):
    """Any value, because nothing reads the field: only training does."""

    def accepts(self, value: object) -> bool:
        return True

    def __str__(self) -> str:
        return "anything"


def optional(kind: Kind) -> Kind:
    """The kind, or null."""
    return Either(kind, Nothing())


@dataclass(frozen=True)
class Field:
    """A field of a section."""

    kind: Kind
    required: bool = False
    default: Any = _ABSENT
    """What an absent field means; without one the field stays absent, for the reader's own default."""


Table: TypeAlias = Mapping[str, Field]


def checked(values: object, table: Table, where: str, origin: str, *, others: bool = False) -> dict[str, Any]:
    """The used fields of one section, each of its kind; what `Ignored` is left out.

    Args:
        values: the section as it was read.
        where: the section's name in messages, such as `transformer_lm`; empty for the top level.
        origin: the checkpoint's format and path.
        others: whether fields that are not in the table are left out; otherwise they are an error.

    Raises:
        WeightsError: the section is no mapping, or a field is missing, unknown, or of another kind.
    """
    if not isinstance(values, Mapping):
        raise WeightsError(
            f"{origin} has {shown(values)} for {where or 'its configuration'}; it must be a mapping."
        )
    prefix = f"{where}." if where else ""
    unknown = [] if others else [str(name) for name in values if name not in table]
    if unknown:
        raise WeightsError(
            f"{origin} has the field {prefix}{unknown[0]:.60}, which no MusicGen has: remove it."
        )
    result = {}
    for name, field in table.items():
        value = values.get(name, field.default)
        if value is _ABSENT:
            if field.required:
                raise WeightsError(f"{origin} has no {prefix}{name}; it must be {field.kind}.")
        elif not field.kind.accepts(value):
            raise WeightsError(f"{origin} has {prefix}{name} {shown(value)}; it must be {field.kind}.")
        elif not isinstance(field.kind, Ignored):
            result[name] = value
    return result


def shown(value: object) -> str:
    """A value from a file for a message, cut to some 60 characters."""
    if isinstance(value, int) and not -_MAX_SHOWN_INTEGER < value < _MAX_SHOWN_INTEGER:
        return "an integer of more than 40 digits"  # of very long ones Python makes no text
    return f"{_SHORT.repr(value):.80}"
