"""One entry for equal content, within a budget; the least recently used is evicted first."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from musicgen_svc.errors import WeightsError
from musicgen_svc.loading.cache import DoesNotFit, Entry, LruBudget, ModelCache, Spec
from musicgen_svc.loading.file_hashes import states_of

CPU = torch.device("cpu")


def spec(*files: Path, role: str = "thing", size: int = 4, variant: int = 0) -> Spec[list[str]]:
    """Returns the spec of a part whose value is the list of its files' texts."""
    return Spec(
        role, states_of(files), lambda: size, lambda: [path.read_text() for path in files], variant=variant
    )


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Three files; the second holds the same text as the first."""
    for name, text in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / name).write_text(text)
    return [tmp_path / name for name in "abc"]


def cached(cache: ModelCache, wanted: Spec[list[str]]) -> Entry[list[str]]:
    """Returns the entry of a part, which is in memory then."""
    entry = cache.entry(wanted)
    cache.make_room("The part", [entry])
    cache.get(entry)
    return entry


def test_parts_with_equal_files_share_one_entry(files: list[Path]) -> None:
    cache = ModelCache(100, CPU)
    first = cached(cache, spec(files[0]))
    assert cached(cache, spec(files[1])) is first
    assert cached(cache, spec(files[2])) is not first
    assert cached(cache, spec(files[1], role="another")) is not first
    assert cached(cache, spec(files[1], variant=1)) is not first
    assert cached(cache, spec()) is not cached(cache, spec()), "nothing tells these apart"
    assert cache.used == 6 * 4


def test_the_entry_that_was_used_last_is_evicted_last(files: list[Path]) -> None:
    cache = ModelCache(8, CPU)
    first, second = (cached(cache, spec(path)) for path in (files[0], files[2]))
    cache.get(first)
    cached(cache, spec(files[0], variant=1))
    assert first.in_memory and not second.in_memory and cache.used == 8
    assert cached(cache, spec(files[2])) is not second, "built anew"


def test_a_part_that_cannot_be_built_takes_no_room(files: list[Path]) -> None:
    cache = ModelCache(8, CPU)
    entry = cache.entry(spec(files[0]))
    files[0].unlink()
    with pytest.raises(FileNotFoundError):
        cache.get(entry)
    assert cache.used == 0 and not entry.in_memory
    with pytest.raises(
        WeightsError, match=r"^The part takes 9e-09 GB .* the budget is 8e-09 GB: take a smaller"
    ):
        cache.make_room("The part", [cache.entry(spec(files[1], size=9))])


def test_parts_are_built_before_what_uses_them_and_evicted_after_it(files: list[Path]) -> None:
    cache = ModelCache(8, CPU)
    part = cache.entry(spec(files[0]))
    model = Entry(Spec("model", (), lambda: 4, lambda: [*part.value(), "model"]), parts=[part])
    cache.make_room("The model", [model])
    assert cache.get(model) == ["one", "model"] and cache.used == 8
    with pytest.raises(WeightsError, match=r"takes 1\.2e-08 GB"):
        cache.check_room("The other", [cache.entry(spec(files[2]))], keep=[model])
    cached(cache, spec(files[2]))
    assert part.in_memory and not model.in_memory


def holding(budget: int, **sizes: int) -> LruBudget[str]:
    """Returns a budget with these keys and sizes in bytes; the first is the least recently used."""
    lru = LruBudget[str](budget)
    for key, size in sizes.items():
        lru.add(key, size)
    return lru


def test_the_least_recently_used_keys_are_removed_and_no_more_than_needed() -> None:
    lru = holding(10, a=4, b=3, c=3)
    lru.use("a")
    assert lru.make_room(2) == ["b"]
    assert lru.used == 7 and "a" in lru and "b" not in lru
    assert lru.make_room(3) == [], "that much was free"
    assert lru.make_room(4) == ["c"]


def test_a_key_in_use_is_kept_however_long_ago_it_was_used() -> None:
    lru = holding(10, a=4, b=3, c=3)
    assert lru.make_room(6, keep={"a"}) == ["b", "c"]


def test_keys_in_evict_last_are_removed_last() -> None:
    lru = holding(10, a=4, b=3, c=3)
    assert lru.make_room(2, evict_last={"a"}) == ["b"]
    lru.add("d", 2)
    assert lru.make_room(9, evict_last={"a"}) == ["c", "d", "a"]


def test_what_does_not_fit_removes_nothing() -> None:
    lru = holding(10, a=4, b=3)
    for need, keep in ((11, set[str]()), (7, {"a"})):
        with pytest.raises(DoesNotFit) as caught:
            lru.make_room(need, keep=keep)
        assert (caught.value.need, caught.value.budget) == (11, 10)
        assert lru.used == 7


@given(
    st.integers(24, 60),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 7), st.integers(0, 7)), max_size=40),
)
def test_the_budget_is_never_exceeded_and_no_part_is_removed_before_its_model(
    budget: int, requests: list[tuple[int, int, int]]
) -> None:
    """Uses models of two parts each, of which some are shared, in any order, as the loader does."""
    lru = LruBudget[str](budget)
    parts_of: dict[str, tuple[str, str]] = {}
    for number, size, shared in requests:
        model, parts = f"model {number} {shared}", (f"codec {number}", f"text {shared % 2}")
        needed = [model, *parts]
        missing = [key for key in needed if key not in lru]
        lru.make_room(len(missing) * (size + 1), keep=needed)
        for key in reversed(missing):
            lru.add(key, size + 1)
        lru.use(*needed)
        parts_of[model] = parts
        assert lru.used <= budget
        assert all(key in lru for key in needed)
        for other, its in parts_of.items():
            assert other not in lru or all(part in lru for part in its)
