"""Things by what they are made of: one of each content, and the least recently used let go."""

from pathlib import Path

import pytest
import torch

from musicgen_svc.loading.cache import Draft, Item, Recipe, Store
from musicgen_svc.loading.lru_budget import DoesNotFit

CPU = torch.device("cpu")


def recipe(*files: Path, kind: str = "thing", size: int = 4, variant: int = 0) -> Recipe[list[str]]:
    """A list of the files' texts."""
    return Recipe(
        kind, files, lambda: Draft(size, lambda: [path.read_text() for path in files]), variant=variant
    )


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """The second holds the same as the first."""
    for name, text in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / name).write_text(text)
    return [tmp_path / name for name in "abc"]


def held(store: Store, wanted: Recipe[list[str]]) -> Item[list[str]]:
    item = store.find(wanted)
    store.make_room([item])
    store.get(item)
    return item


def test_equal_files_make_one_thing(files: list[Path]) -> None:
    store = Store(100, CPU)
    first = held(store, recipe(files[0]))
    assert held(store, recipe(files[1])) is first
    assert held(store, recipe(files[2])) is not first
    assert held(store, recipe(files[1], kind="another")) is not first
    assert held(store, recipe(files[1], variant=1)) is not first
    assert held(store, recipe()) is not held(store, recipe()), "nothing tells these apart"
    assert store.used == 6 * 4


def test_what_was_got_last_stays_longest(files: list[Path]) -> None:
    store = Store(8, CPU)
    first, second = (held(store, recipe(path)) for path in (files[0], files[2]))
    store.get(first)
    held(store, recipe(files[0], variant=1))
    assert first.resident and not second.resident and store.used == 8
    assert held(store, recipe(files[2])) is not second, "built anew"


def test_what_cannot_be_built_takes_no_room(files: list[Path]) -> None:
    store = Store(8, CPU)
    item = store.find(recipe(files[0]))
    files[0].unlink()
    with pytest.raises(FileNotFoundError):
        store.get(item)
    assert store.used == 0 and not item.resident
    with pytest.raises(DoesNotFit):
        store.make_room([store.find(recipe(files[1], size=9))])
