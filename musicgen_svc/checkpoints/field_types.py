"""The types of a configuration's fields, and the check of a section against a table of its fields.

A table maps each field's name to its type. A missing field is an error if it is `required`, gets its
`default` if it has one, and otherwise stays missing. This module knows no model: the tables are in
`field_tables.py` and `part_field_tables.py`.
"""

import reprlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from musicgen_svc.errors import WeightsError

_NO_DEFAULT = object()
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 60
_MAX_QUOTED_INTEGER = 10**40


class FieldType(ABC):
    """A set of accepted values, and the words that describe it in a message."""

    @abstractmethod
    def accepts(self, value: object) -> bool:
        """Whether the value is one of the set."""

    @abstractmethod
    def __str__(self) -> str:
        """The words that follow "it must be" in a message."""


@dataclass(frozen=True)
class Integer(FieldType):
    """An integer from `low` to `high`."""

    low: int
    high: int

    def accepts(self, value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and self.low <= value <= self.high

    def __str__(self) -> str:
        return f"an integer from {self.low} to {self.high}"


@dataclass(frozen=True)
class Number(FieldType):
    """A number from `low` to `high`, integers and fractions included; never NaN."""

    low: float
    high: float
    exclusive: bool = False
    """Whether `low` itself is refused."""

    def accepts(self, value: object) -> bool:
        if not isinstance(value, int | float | Fraction) or isinstance(value, bool):
            return False
        return self.low <= value <= self.high and not (self.exclusive and value == self.low)

    def __str__(self) -> str:
        low = f"above {self.low:g} and up" if self.exclusive else f"from {self.low:g}"
        return f"a number {low} to {self.high:g}"


@dataclass(frozen=True)
class Boolean(FieldType):
    """True or false. The integers 1 and 0 are accepted too."""

    def accepts(self, value: object) -> bool:
        return isinstance(value, bool) or (isinstance(value, int) and value in (0, 1))

    def __str__(self) -> str:
        return "true or false"


@dataclass(frozen=True)
class Text(FieldType):
    """A string of at most `max_length` characters."""

    max_length: int = 1000

    def accepts(self, value: object) -> bool:
        return isinstance(value, str) and len(value) <= self.max_length

    def __str__(self) -> str:
        return f"a text of at most {self.max_length} characters"


class OneOf(FieldType):
    """One of a few strings."""

    def __init__(self, *values: str) -> None:
        self._values = values

    def accepts(self, value: object) -> bool:
        return isinstance(value, str) and value in self._values

    def __str__(self) -> str:
        quoted = [repr(value) for value in self._values]
        return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} or {quoted[-1]}"


@dataclass(frozen=True)
class ListOf(FieldType):
    """A list of `min_length` to `max_length` values of one type."""

    item: FieldType
    min_length: int
    max_length: int

    def accepts(self, value: object) -> bool:
        return (
            isinstance(value, list | tuple)
            and self.min_length <= len(value) <= self.max_length
            and all(self.item.accepts(item) for item in value)
        )

    def __str__(self) -> str:
        return f"a list of {self.min_length} to {self.max_length} values, each {self.item}"


@dataclass(frozen=True)
class MapOf(FieldType):
    """A mapping of at most `max_length` names to values of one type."""

    item: FieldType
    max_length: int

    def accepts(self, value: object) -> bool:
        return (
            isinstance(value, Mapping)
            and len(value) <= self.max_length
            and all(isinstance(name, str) and self.item.accepts(item) for name, item in value.items())
        )

    def __str__(self) -> str:
        return f"a mapping of at most {self.max_length} names to values, each {self.item}"


class AnyOf(FieldType):
    """A value of one of several types."""

    def __init__(self, *types: FieldType) -> None:
        self._types = types

    def accepts(self, value: object) -> bool:
        return any(accepted.accepts(value) for accepted in self._types)

    def __str__(self) -> str:
        return " or ".join(str(accepted) for accepted in self._types)


class Null(FieldType):
    """Null."""

    def accepts(self, value: object) -> bool:
        return value is None

    def __str__(self) -> str:
        return "null"


class Ignored(FieldType):
    """Any value, because only training reads the field. `read_fields` leaves the field out."""

    def accepts(self, value: object) -> bool:
        return True

    def __str__(self) -> str:
        return "anything"


def optional(type_: FieldType) -> FieldType:
    """The type, or null."""
    return AnyOf(type_, Null())


@dataclass(frozen=True)
class Field:
    """One row of a table: a field's type, and what happens if the field is missing."""

    type: FieldType
    required: bool = False
    default: Any = _NO_DEFAULT
    """The value of a missing field. Without one the field stays missing: audiocraft has its own default."""


type Table = Mapping[str, Field]


def read_fields(
    values: object, table: Table, section: str, origin: str, *, skip_unknown: bool = False
) -> dict[str, Any]:
    """Checks one section of a configuration, and returns the fields that are used, with their defaults.

    Args:
        values: the section as the file has it.
        section: its name in messages, such as `transformer_lm`; empty for the top level.
        origin: the checkpoint's format and path.
        skip_unknown: whether fields that are not in the table are left out; otherwise they are an error.

    Raises:
        WeightsError: the section is not a mapping, or a field is missing, unknown, or of another type.
    """
    if not isinstance(values, Mapping):
        raise WeightsError(
            f"{origin} has {quoted(values)} for {section or 'its configuration'}; it must be a mapping."
        )
    prefix = f"{section}." if section else ""
    unknown = [] if skip_unknown else [str(name) for name in values if name not in table]
    if unknown:
        raise WeightsError(
            f"{origin} has the field {prefix}{unknown[0]:.60}, which no MusicGen has: remove it."
        )
    result = {}
    for name, field in table.items():
        value = values.get(name, field.default)
        if value is _NO_DEFAULT:
            if field.required:
                raise WeightsError(f"{origin} has no {prefix}{name}; it must be {field.type}.")
        elif not field.type.accepts(value):
            raise WeightsError(f"{origin} has {prefix}{name} {quoted(value)}; it must be {field.type}.")
        elif not isinstance(field.type, Ignored):
            result[name] = value
    return result


def quoted(value: object) -> str:
    """A value from a file as a message quotes it, cut to about 60 characters."""
    if isinstance(value, int) and not -_MAX_QUOTED_INTEGER < value < _MAX_QUOTED_INTEGER:
        # Python refuses to convert very long integers to text.
        return "an integer of more than 40 digits"
    return f"{_REPR.repr(value):.80}"
