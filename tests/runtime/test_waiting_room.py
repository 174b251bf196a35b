"""Requests wait for a slot in the order of arrival, and no model's requests wait for ever."""

import asyncio
from collections.abc import Hashable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from musicgen_svc.errors import Stopped
from musicgen_svc.runtime import waiting_room
from musicgen_svc.runtime.waiting_room import OVERTAKING_PER_SLOT, WaitingRoom


class Requests:
    """Requests in a waiting room, each of which ends when it is told to."""

    def __init__(self, slots: int) -> None:
        self.room = WaitingRoom(slots)
        self.admitted: list[int] = []
        self.running: dict[int, Hashable] = {}
        self._ends: list[asyncio.Event] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def arrive(self, *groups: Hashable) -> None:
        """Lets one request of each group arrive, in this order."""
        for group in groups:
            self._ends.append(asyncio.Event())
            self._tasks.append(asyncio.create_task(self._run(len(self._tasks), group)))
            await asyncio.sleep(0)

    async def end(self, number: int) -> None:
        """Ends the request with this number, and lets others be admitted."""
        self._ends[number].set()
        await self._tasks[number]
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def cancel(self, number: int) -> None:
        self._tasks[number].cancel()
        with pytest.raises(asyncio.CancelledError):
            await self._tasks[number]
        await asyncio.sleep(0)

    async def _run(self, number: int, group: Hashable) -> None:
        async with self.room.slot(group, lambda before: None):
            self.admitted.append(number)
            self.running[number] = group
            await self._ends[number].wait()
            del self.running[number]


def test_requests_are_admitted_in_the_order_of_arrival_and_never_more_than_slots() -> None:
    async def main() -> None:
        requests = Requests(2)
        await requests.arrive(*["small"] * 5)
        assert requests.admitted == [0, 1] and (requests.room.running, requests.room.waiting) == (2, 3)
        await requests.end(1)
        await requests.end(0)
        assert requests.admitted == [0, 1, 2, 3]
        for number in (2, 3, 4):
            await requests.end(number)
        assert requests.admitted == [0, 1, 2, 3, 4]
        assert requests.room.running == requests.room.waiting == 0

    asyncio.run(main())


def test_a_cancelled_request_leaves_the_queue_at_once() -> None:
    async def main() -> None:
        requests = Requests(1)
        await requests.arrive("small", "medium", "small")
        await requests.cancel(1)
        assert requests.room.waiting == 1
        await requests.cancel(0)
        assert requests.admitted == [0, 2]

    asyncio.run(main())


def test_a_request_without_a_group_runs_beside_any() -> None:
    async def main() -> None:
        requests = Requests(2)
        await requests.arrive("small", "medium", None)
        assert requests.admitted == [0, 2]
        await requests.end(0)
        assert requests.admitted == [0, 2, 1]

    asyncio.run(main())


def test_a_waiting_request_is_told_its_position_and_may_give_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting_room, "POLL_S", 0.001)
    seen: list[int] = []

    def on_wait(before: int) -> None:
        seen.append(before)
        if len(seen) == 4:
            raise Stopped

    async def main() -> None:
        requests = Requests(1)
        await requests.arrive("small", "small", "small")
        with pytest.raises(Stopped):
            async with requests.room.slot("small", on_wait):
                raise AssertionError
        assert requests.room.waiting == 2

    asyncio.run(main())
    assert seen == [2, 2, 2, 2]


def test_a_request_is_not_overtaken_by_more_than_allowed_when_several_slots_become_free_at_once() -> None:
    async def main() -> None:
        requests = Requests(3)
        await requests.arrive("small", "medium", "large", *["small"] * 5, "medium", "medium")
        while 1 not in requests.admitted:
            await requests.end(min(requests.running))
        assert requests.admitted == [0, 3, 4, 5, 6, 7, 1, 8], "then large was overtaken six times"

    asyncio.run(main())


@settings(deadline=None)
@given(
    slots=st.integers(1, 4),
    groups=st.lists(st.sampled_from(["small", "medium", "large", None]), min_size=1, max_size=30),
    data=st.data(),
)
def test_no_slot_is_lost_no_models_mix_and_overtaking_is_bounded(
    slots: int, groups: list[str | None], data: st.DataObject
) -> None:
    async def main() -> None:
        requests = Requests(slots)
        await requests.arrive(*groups)
        while requests.running:
            assert len(requests.running) <= slots
            assert len({group for group in requests.running.values() if group}) <= 1, "models were mixed"
            if len(requests.running) < slots:  # then all who wait are of another group
                waiting = [group for n, group in enumerate(groups) if n not in requests.admitted]
                assert None not in waiting
            await requests.end(data.draw(st.sampled_from(sorted(requests.running))))
        assert sorted(requests.admitted) == list(range(len(groups))), "a request was never admitted"
        order = {number: at for at, number in enumerate(requests.admitted)}
        for number, group in enumerate(groups):
            later = [n for n in range(number + 1, len(groups)) if order[n] < order[number]]
            same = [n for n in later if groups[n] == group]
            others = [n for n in later if groups[n] not in (group, None)]
            assert not same, "first come, first served"
            assert group is None or len(others) <= OVERTAKING_PER_SLOT * slots

    asyncio.run(main())


def test_alternating_models_fill_the_slots() -> None:
    """In the strict order of arrival each of them would run alone."""

    async def main() -> None:
        requests = Requests(4)
        await requests.arrive(*["small", "medium"] * 8)
        assert sorted(requests.running.values()) == ["small"] * 4

    asyncio.run(main())
