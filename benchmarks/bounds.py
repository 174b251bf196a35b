"""Bounds of figures on the command lines of benchmarks, such as `--at-least steps@1=1500`."""

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Bound:
    """A value that a figure must reach, or must not exceed."""

    figure: str
    value: float
    at: str = ""
    """Of which row the figure is, such as the number of slots. Empty: of every row."""

    def option(self) -> str:
        """The argument of a command line that `parsed` reads."""
        return f"{self.figure}{'@' if self.at else ''}{self.at}={self.value:g}"


def parsed(text: str, figures: Iterable[str]) -> Bound:
    """Parses "ratio=10" or "steps@1=1500".

    Raises:
        ValueError: the figure is none of `figures`, or the value is no number.
    """
    name, _, value = text.partition("=")
    figure, _, at = name.partition("@")
    if figure not in figures:
        raise ValueError(text)
    return Bound(figure, float(value), at)


def refuse_unknown_rows(
    parser: argparse.ArgumentParser, bounds: Iterable[Bound], rows: Iterable[str]
) -> None:
    """Ends the command with an error if a bound is for a row that it does not measure."""
    known = list(rows)
    for bound in bounds:
        if bound.at not in ("", *known):
            parser.error(f"{bound.option()} was given, one of {', '.join(known)} is expected after @")


def missed(
    found: Mapping[str, float], at: str, at_least: Iterable[Bound], at_most: Iterable[Bound]
) -> list[str]:
    """Compares the figures of one row with bounds.

    Args:
        found: name of a figure -> its value. A figure that is missing meets no bound.
        at: of which row they are.
        at_least: bounds below which no figure may be.
        at_most: bounds above which no figure may be.

    Returns:
        list: a part of a sentence for each bound that is not met.
    """
    nothing = float("nan")
    checks = [(bound, "at least", found.get(bound.figure, nothing) >= bound.value) for bound in at_least]
    checks += [(bound, "at most", found.get(bound.figure, nothing) <= bound.value) for bound in at_most]
    return [
        f"{bound.figure} is {found.get(bound.figure, nothing):.4g}, {limit} {bound.value:g} was expected"
        for bound, limit, met in checks
        if bound.at in ("", at) and not met
    ]
