"""What stays within the budget, and what goes first: keys and bytes alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from musicgen_svc.loading.lru_budget import DoesNotFit, Residency


def holding(budget: int, **sizes: int) -> Residency:
    """The first named is the least recently used."""
    residency = Residency(budget)
    for key, size in sizes.items():
        residency.add(key, size)
    return residency


def test_the_least_recently_used_goes_and_no_more_than_must() -> None:
    residency = holding(10, a=4, b=3, c=3)
    residency.use("a")
    assert residency.make_room(2) == ["b"]
    assert residency.used == 7 and "a" in residency and "b" not in residency
    assert residency.make_room(3) == [], "that much was free"
    assert residency.make_room(4) == ["c"]


def test_what_is_in_use_stays_however_long_ago_it_was_asked_for() -> None:
    residency = holding(10, a=4, b=3, c=3)
    assert residency.make_room(6, keep={"a"}) == ["b", "c"]


def test_what_is_spared_goes_last() -> None:
    residency = holding(10, a=4, b=3, c=3)
    assert residency.make_room(2, last={"a"}) == ["b"]
    residency.add("d", 2)
    assert residency.make_room(9, last={"a"}) == ["c", "d", "a"]


def test_what_does_not_fit_moves_nothing() -> None:
    residency = holding(10, a=4, b=3)
    for need, keep in ((11, set[str]()), (7, {"a"})):
        with pytest.raises(DoesNotFit) as caught:
            residency.make_room(need, keep=keep)
        assert (caught.value.need, caught.value.budget) == (11, 10)
        assert residency.used == 7


@given(
    st.integers(24, 60),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 7), st.integers(0, 7)), max_size=40),
)
def test_the_budget_holds_and_nothing_outlives_what_is_made_of_it(
    budget: int, requests: list[tuple[int, int, int]]
) -> None:
    """Models made of two parts each, some shared, asked for in any order, as the loader asks."""
    residency = Residency(budget)
    parts_of: dict[str, tuple[str, str]] = {}
    for number, size, shared in requests:
        model, parts = f"model {number} {shared}", (f"codec {number}", f"text {shared % 2}")
        needed = [model, *parts]
        missing = [key for key in needed if key not in residency]
        residency.make_room(len(missing) * (size + 1), keep=needed)
        for key in reversed(missing):
            residency.add(key, size + 1)
        residency.use(*needed)
        parts_of[model] = parts
        assert residency.used <= budget
        assert all(key in residency for key in needed)
        for other, its in parts_of.items():
            assert other not in residency or all(part in residency for part in its)
