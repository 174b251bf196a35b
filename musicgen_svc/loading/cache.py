"""Built models and their parts: one of each content, within a budget, let go in the order of their use."""

import gc
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from musicgen_svc.checkpoints.damage import check_not_damaged
from musicgen_svc.loading.file_hashes import FileState, Hashes
from musicgen_svc.loading.lru_budget import Residency
from musicgen_svc.runtime.randomness import GlobalRandom

T = TypeVar("T")


@dataclass(frozen=True)
class Draft(Generic[T]):
    """What is known of a thing before it is built."""

    size: int
    """Bytes that it will take, in its final types."""
    build: Callable[[], T]


@dataclass(frozen=True)
class Recipe(Generic[T]):
    """A thing by what it is made of."""

    kind: str
    files: tuple[Path, ...]
    """All that it is made of, in an order that does not depend on where they lie."""
    draft: Callable[[], Draft[T]]
    """Called if there is no such thing yet; raises if it cannot be built."""
    variant: Hashable = None
    """What else it depends on."""


class Item(Generic[T]):
    """A thing that is resident, was, or is about to be."""

    def __init__(self, recipe: Recipe[T], files: Sequence[FileState], draft: Draft[T]) -> None:
        self.kind, self.variant, self.files = recipe.kind, recipe.variant, files
        self.size = draft.size
        self._build: Callable[[], T] | None = draft.build
        self._value: T | None = None

    @property
    def resident(self) -> bool:
        return self._value is not None

    def build(self) -> T:
        assert self._build is not None
        self._value = self._build()
        self._build = None  # it may hold what the thing was built from
        return self._value

    def value(self) -> T:
        assert self._value is not None
        return self._value

    def let_go(self) -> None:
        self._value = None


class Store:
    """Not safe from several threads: whoever loads holds the device."""

    def __init__(self, budget: int, device: torch.device) -> None:
        """`budget`: in bytes."""
        self.hashes = Hashes()
        self._residency = Residency(budget)
        self._device = device
        self._items: list[Item[Any]] = []

    @property
    def used(self) -> int:
        """Bytes of everything that is resident."""
        return self._residency.used

    def find(self, recipe: Recipe[T]) -> Item[T]:
        """The resident thing of the same content, or one that is still to be built.

        Raises:
            WeightsError: one of its files is missing or damaged, or its draft says what is wrong with them.
        """
        for path in recipe.files:
            check_not_damaged(path)
        files = [FileState.of(path) for path in recipe.files]
        for item in self._items:
            alike = (item.kind, item.variant) == (recipe.kind, recipe.variant)
            if alike and files and self.hashes.equal(item.files, files):
                return item
        return Item(recipe, files, recipe.draft())

    def make_room(
        self, items: Sequence[Item[Any]], keep: Collection[Item[Any]] = (), last: Collection[Item[Any]] = ()
    ) -> None:
        """Lets go of others so that these fit: before any of them is built.

        Args:
            keep: what is in use.
            last: what is only let go if nothing else is left.

        Raises:
            DoesNotFit: nothing has been let go.
        """
        gone = self._residency.make_room(_missing(items), keep={*keep, *items}, last=last)
        if not gone:
            return
        for item in gone:
            assert isinstance(item, Item)
            item.let_go()
            self._items.remove(item)
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def check_room(self, items: Sequence[Item[Any]], keep: Collection[Item[Any]] = ()) -> None:
        """
        Raises:
            DoesNotFit: `make_room` could not make these fit beside what is kept.
        """
        self._residency.check(_missing(items), keep={*keep, *items})

    def get(self, item: Item[T]) -> T:
        """The thing itself, built if need be; there must be room. It is the most recently used now."""
        if not item.resident:
            # Building a model draws from the global generators, which may be a request's by now.
            with GlobalRandom(0, self._device).pinned(), torch.inference_mode(False):
                item.build()
            self._items.append(item)
            self._residency.add(item, item.size)
        self._residency.use(item)
        return item.value()

    def use(self, *items: Item[Any]) -> None:
        """They are the most recently used, the last of them the most."""
        self._residency.use(*items)


def _missing(items: Sequence[Item[Any]]) -> int:
    """In bytes."""
    return sum(item.size for item in items if not item.resident)
