"""Threads acquire turns in order of arrival, a waiting thread can give up, and none waits for ever."""

import threading
from collections.abc import Callable

import pytest

from musicgen_svc.runtime.fair_queue import FairQueue, Turn

WAIT_S = 60.0


def never_gives_up() -> None:
    """A check that never raises."""


class Person:
    """A thread that acquires a turn, records its name, and holds the turn until it is told to leave."""

    def __init__(self, queue: FairQueue, name: str, came: list[str], group: str | None = None) -> None:
        self.turn: Turn | None = None
        self._leave, self._inside = threading.Event(), threading.Event()
        self._steps: list[Callable[[Turn], None]] = []

        def run() -> None:
            with queue.acquire(never_gives_up, group) as self.turn:
                came.append(name)
                self._inside.set()
                assert self._leave.wait(WAIT_S)
                for step in self._steps:
                    step(self.turn)

        before = queue.length
        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()
        while queue.length == before:
            pass

    @property
    def inside(self) -> bool:
        """Whether it has acquired its turn by now. False does not mean that it never will."""
        return self._inside.wait(0.05)

    def enters(self) -> None:
        """Waits until it has acquired its turn."""
        assert self._inside.wait(WAIT_S)

    def leaves(self, *steps: Callable[[Turn], None]) -> None:
        """Tells it to end its turn, after some steps."""
        self._steps.extend(steps)
        self._leave.set()

    def has_left(self) -> None:
        """Waits until its thread has ended."""
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()


def test_turns_are_acquired_in_order_of_arrival_and_can_be_given_up() -> None:
    queue, came = FairQueue(1), list[str]()

    def give_up() -> None:
        raise TimeoutError

    holder = Person(queue, "holder", came)
    first = Person(queue, "first", came)
    with pytest.raises(TimeoutError), queue.acquire(give_up):
        pytest.fail("the turn was never free")
    second = Person(queue, "second", came)
    assert not first.inside
    for person in (holder, first, second):
        person.leaves()
        person.has_left()
    assert came == ["holder", "first", "second"] and queue.length == 0


def test_at_most_the_given_number_hold_a_turn_at_once() -> None:
    queue, came = FairQueue(2), list[str]()
    one, two, three = (Person(queue, name, came) for name in "123")
    one.enters()
    two.enters()
    assert not three.inside
    two.leaves()
    three.enters()
    for person in (one, three):
        person.leaves()
        person.has_left()


def test_another_group_waits_for_all_before_it_and_all_behind_it_wait() -> None:
    queue, came = FairQueue(9), list[str]()
    a1, a2 = Person(queue, "a1", came, "a"), Person(queue, "a2", came, "a")
    b1 = Person(queue, "b1", came, "b")
    a3, a4 = Person(queue, "a3", came, "a"), Person(queue, "a4", came, "a")
    b2 = Person(queue, "b2", came, "b")
    a1.leaves()
    a1.has_left()
    a2.enters()
    assert not b1.inside and not a3.inside
    a2.leaves()
    b1.enters()
    assert not a3.inside and not b2.inside
    b1.leaves()
    a3.enters()
    a4.enters()
    assert not b2.inside
    a3.leaves()
    a4.leaves()
    b2.enters()
    b2.leaves()
    b2.has_left()
    assert came[:3] == ["a1", "a2", "b1"] and set(came[3:5]) == {"a3", "a4"} and came[5:] == ["b2"]


def test_a_thread_of_another_group_that_gives_up_no_longer_blocks_the_others() -> None:
    queue, came = FairQueue(9), list[str]()
    a1 = Person(queue, "a1", came, "a")
    calls = 0

    def give_up_soon() -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            a2 = Person(queue, "a2", came, "a")
            assert not a2.inside
            a2.leaves()
        else:
            raise TimeoutError

    with pytest.raises(TimeoutError), queue.acquire(give_up_soon, "b"):
        pytest.fail("a1 never left")
    while came != ["a1", "a2"]:
        pass
    a1.leaves()


def test_a_turn_that_joins_the_group_of_waiting_threads_admits_them() -> None:
    queue, came = FairQueue(2), list[str]()
    alone, other = Person(queue, "alone", came, "its own"), Person(queue, "other", came, "a")
    alone.enters()
    assert not other.inside
    assert alone.turn
    alone.turn.join_group("a")
    other.enters()
    for person in (alone, other):
        person.leaves()
        person.has_left()


def test_a_turn_that_is_yielded_comes_back_after_all_who_waited() -> None:
    queue, came = FairQueue(1), list[str]()
    with queue.acquire(never_gives_up) as turn:
        assert not turn.over, "nobody waits"
        one, two = Person(queue, "one", came), Person(queue, "two", came)
        assert not one.inside
        while not turn.over:
            pass
        one.leaves()
        two.leaves()
        turn.yield_turn(never_gives_up)
        assert came == ["one", "two"]
        assert not turn.over, "its time begins again"
    assert queue.length == 0


def test_an_error_while_waiting_after_a_yield_is_raised_inside_the_next_turn() -> None:
    queue, came = FairQueue(1), list[str]()

    def give_up() -> None:
        one.leaves()
        raise TimeoutError

    with pytest.raises(TimeoutError), queue.acquire(never_gives_up) as turn:
        one, two = Person(queue, "one", came), Person(queue, "two", came)
        try:
            turn.yield_turn(give_up)
        finally:
            assert turn._entry.acquired.is_set() and came == ["one"], "before two, and in a turn"
    two.enters()
    two.leaves()
    two.has_left()
    assert queue.length == 0


def test_the_next_turn_can_be_acquired_before_all_who_wait() -> None:
    queue, came = FairQueue(1), list[str]()
    holder, queued = Person(queue, "holder", came), Person(queue, "queued", came)

    def take_next() -> None:
        with queue.acquire_next():
            came.append("next")

    thread = threading.Thread(target=take_next)
    thread.start()
    while queue.length < 3:
        pass
    holder.leaves()
    thread.join()
    queued.enters()
    queued.leaves()
    queued.has_left()
    assert came == ["holder", "next", "queued"] and queue.length == 0
