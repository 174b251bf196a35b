"""The cache of models and parts. Equal content has one entry; the least recently used is evicted first."""

import gc
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from musicgen_svc.errors import WeightsError
from musicgen_svc.loading.file_hashes import FileState, Hashes
from musicgen_svc.loading.memory_budget import GB
from musicgen_svc.runtime.randomness import GlobalRandom


@dataclass(frozen=True)
class Spec[T]:
    """What is known of a model or part before it is built.

    Two specs of parts with the same role, variant and content of files are specs of the same part.
    """

    role: str
    """What it is for, such as `codec`."""
    files: tuple[FileState, ...]
    """All files that it is made of, in an order that does not depend on where they are."""
    size: Callable[[], int]
    """Returns the bytes that it will take in memory, in its final types. Raises `WeightsError` if the files
    cannot be read.
    """
    build: Callable[[], T]
    variant: Hashable = None
    """Whatever else it depends on."""


class Entry[T]:
    """A model or part: not built yet, in memory, or evicted."""

    def __init__(self, spec: Spec[T], parts: Sequence["Entry[Any]"] = ()) -> None:
        """Makes an entry that is not built yet.

        Args:
            spec: what it is and how it is built.
            parts: the entries that it uses. They must stay in memory as long as it does.

        Raises:
            WeightsError: its files cannot be read.
        """
        self.role, self.variant, self.files = spec.role, spec.variant, spec.files
        self.parts = tuple(parts)
        self.size = spec.size()  # bytes
        self._build: Callable[[], T] | None = spec.build
        self._value: T | None = None

    @property
    def in_memory(self) -> bool:
        """Whether it has been built and not been evicted since."""
        return self._value is not None

    @property
    def unchanged(self) -> bool:
        """Whether its files are unchanged since loading (on a CPU the weights are mapped from them)."""
        return all(file.unchanged for file in self.files)

    def build(self) -> None:
        """Builds the value. It can be built only once: after an eviction a new entry is made."""
        assert self._build is not None
        self._value = self._build()
        self._build = None  # the function may hold the tensors that it was built from

    def value(self) -> T:
        """Returns the value, which must be in memory."""
        assert self._value is not None
        return self._value

    def drop(self) -> None:
        """Drops the value, so that its memory is freed when nothing else uses it."""
        self._value = None


class ModelCache:
    """Keeps models and parts in memory within a budget, and shares parts of equal content.

    It is not safe to use from several threads: whoever loads must hold the device.
    """

    def __init__(self, budget: int, device: torch.device) -> None:
        """Makes an empty cache.

        Args:
            budget: bytes of everything together.
            device: where the models run.
        """
        self.hashes = Hashes()
        self._budget: LruBudget[Entry[Any]] = LruBudget(budget)
        self._device = device

    @property
    def used(self) -> int:
        """Bytes of everything that is in memory."""
        return self._budget.used

    def entry[T](self, spec: Spec[T]) -> Entry[T]:
        """Returns the entry in memory of the same part, or a new one, which `get` builds and keeps.

        Raises:
            WeightsError: the part is not in memory, and its files cannot be read.
        """
        for entry in self._budget:
            alike = (entry.role, entry.variant) == (spec.role, spec.variant)
            if alike and spec.files and self.hashes.equal(entry.files, spec.files):
                return entry
        return Entry(spec)

    def check_room(self, what: str, entries: Sequence[Entry[Any]], keep: Collection[Entry[Any]] = ()) -> None:
        """Raises the error that `make_room` would raise for the same arguments. Evicts nothing.

        Raises:
            WeightsError: the entries do not fit beside what must be kept.
        """
        entries = _with_parts(entries)
        try:
            self._budget.check(_missing_bytes(entries), keep={*_with_parts(keep), *entries})
        except DoesNotFit as exc:
            sentence = (
                f"{what} takes {exc.need / GB:.3g} GB of memory, and the budget is {exc.budget / GB:.3g} GB: "
                "take a smaller model, or raise MUSICGEN_MEMORY_BUDGET_GB."
            )
            raise WeightsError(sentence, for_client=sentence) from exc

    def make_room(
        self, what: str, entries: Sequence[Entry[Any]],
        *, keep: Collection[Entry[Any]] = (), evict_last: Collection[Entry[Any]] = (),
    ) -> None:  # fmt: skip
        """Evicts entries until the given ones fit into the budget together with their parts.

        It must be called before any of the given entries is built.

        Args:
            what: a name for all given entries together, with which the error message begins.
            entries: those that will be in memory at once. The ones that are in memory already are kept, and
                need no more room.
            keep: other entries that must not be evicted, because they are in use.
            evict_last: entries that are evicted only if evicting all others is not enough.

        Raises:
            WeightsError: the entries do not fit beside what must be kept; nothing has been evicted.
        """
        self.check_room(what, entries, keep)
        entries = _with_parts(entries)
        kept = {*_with_parts(keep), *entries}
        evicted = self._budget.make_room(_missing_bytes(entries), kept, _with_parts(evict_last))
        if not evicted:
            return
        for entry in evicted:
            entry.drop()
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def get[T](self, entry: Entry[T]) -> T:
        """Returns the value of an entry, and marks the entry as the most recently used.

        An entry that is not in memory is built first, after its parts; there must be room for it.
        """
        for part in entry.parts:
            self.get(part)
        if not entry.in_memory:
            # Modules draw random numbers when they are built, and the global generators may be in use by a
            # request.
            with GlobalRandom(0, self._device).pinned(), torch.inference_mode(False):
                entry.build()
            self._budget.add(entry, entry.size)
        # The parts are marked after the model, so that the model is evicted before them.
        self._budget.use(entry, *entry.parts)
        return entry.value()


def _with_parts(entries: Iterable[Entry[Any]]) -> list[Entry[Any]]:
    """Returns the entries and their parts, each once."""
    return list(dict.fromkeys(found for entry in entries for found in (entry, *entry.parts)))


def _missing_bytes(entries: Sequence[Entry[Any]]) -> int:
    """Bytes of the entries that are not in memory yet."""
    return sum(entry.size for entry in entries if not entry.in_memory)


class DoesNotFit(Exception):
    """The error of a budget that is smaller than what is needed at once, both in bytes."""

    def __init__(self, need: int, budget: int) -> None:
        super().__init__(f"{need:,} bytes of {budget:,}")
        self.need, self.budget = need, budget


class LruBudget[K: Hashable]:
    """Sizes of keys within a budget, and the order in which they were last used. It holds no values."""

    def __init__(self, budget: int) -> None:
        """Makes an empty budget of `budget` bytes for everything together."""
        self.budget = budget
        self._sizes: dict[K, int] = {}  # bytes; the least recently used key first

    @property
    def used(self) -> int:
        """Bytes of all keys."""
        return sum(self._sizes.values())

    def __contains__(self, key: K) -> bool:
        return key in self._sizes

    def __iter__(self) -> Iterator[K]:
        return iter(self._sizes)

    def add(self, key: K, size: int) -> None:
        """Adds a key of `size` bytes as the most recently used."""
        assert key not in self._sizes and self.used + size <= self.budget, (key, size, self.used, self.budget)
        self._sizes[key] = size

    def use(self, *keys: K) -> None:
        """Marks the keys as used; the last of them is the most recently used."""
        for key in keys:
            self._sizes[key] = self._sizes.pop(key)

    def check(self, need: int, keep: Collection[K]) -> None:
        """Fails if `need` more bytes do not fit beside the keys in `keep`.

        Raises:
            DoesNotFit: they do not, even if all other keys are evicted.
        """
        kept = sum(size for key, size in self._sizes.items() if key in keep)
        if kept + need > self.budget:
            raise DoesNotFit(kept + need, self.budget)

    def make_room(self, need: int, keep: Collection[K] = (), evict_last: Collection[K] = ()) -> list[K]:
        """Removes keys, the least recently used first, until `need` more bytes fit.

        Args:
            need: in bytes.
            keep: keys that are not removed.
            evict_last: keys that are removed only if removing all others is not enough.

        Returns:
            The removed keys, in order.

        Raises:
            DoesNotFit: the bytes do not fit beside what is kept; nothing is removed.
        """
        self.check(need, keep)
        candidates = sorted(
            (key for key in self._sizes if key not in keep), key=lambda key: key in evict_last
        )
        removed = []
        while self.used + need > self.budget:
            removed.append(candidates.pop(0))
            del self._sizes[removed[-1]]
        return removed
