"""What stays in memory, within a budget: the least recently used goes first. Keys and bytes, nothing else."""

from collections.abc import Collection, Hashable


class DoesNotFit(Exception):
    """More is needed at once than the budget holds."""

    def __init__(self, need: int, budget: int) -> None:
        super().__init__(f"{need:,} bytes of {budget:,}")
        self.need, self.budget = need, budget


class Residency:
    """Whatever is made of other things is used before them: it is then also let go before them."""

    def __init__(self, budget: int) -> None:
        """`budget`: in bytes, of everything together."""
        self.budget = budget
        self._sizes: dict[Hashable, int] = {}  # the least recently used first

    @property
    def used(self) -> int:
        return sum(self._sizes.values())

    def __contains__(self, key: Hashable) -> bool:
        return key in self._sizes

    def add(self, key: Hashable, size: int) -> None:
        """It is in memory now, as the most recently used."""
        assert key not in self._sizes and self.used + size <= self.budget, (key, size, self.used, self.budget)
        self._sizes[key] = size

    def use(self, *keys: Hashable) -> None:
        """They are the most recently used, the last of them the most."""
        for key in keys:
            self._sizes[key] = self._sizes.pop(key)

    def check(self, need: int, keep: Collection[Hashable]) -> None:
        """
        Raises:
            DoesNotFit: `need` more bytes are too many beside what is kept, whatever else goes.
        """
        kept = sum(size for key, size in self._sizes.items() if key in keep)
        if kept + need > self.budget:
            raise DoesNotFit(kept + need, self.budget)

    def make_room(
        self, need: int, keep: Collection[Hashable] = (), last: Collection[Hashable] = ()
    ) -> list[Hashable]:
        """Forgets so many that `need` more bytes fit, and says which.

        Args:
            keep: what is in use.
            last: what goes only if all the rest is not enough.

        Raises:
            DoesNotFit: not beside what is kept; nothing is forgotten then.
        """
        self.check(need, keep)
        candidates = sorted((key for key in self._sizes if key not in keep), key=lambda key: key in last)
        gone = []
        while self.used + need > self.budget:
            gone.append(candidates.pop(0))
            del self._sizes[gone[-1]]
        return gone
