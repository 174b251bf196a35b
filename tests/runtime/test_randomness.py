"""What a request draws depends on its seed alone, and does not change the global generators."""

import random

import pytest
import torch

from musicgen_svc.runtime.randomness import GlobalRandom

CPU = torch.device("cpu")


def draw() -> tuple[float, float]:
    return random.random(), torch.rand(()).item()


def test_streams_continue_where_they_stopped_whatever_runs_in_between() -> None:
    alone = GlobalRandom(3, CPU)
    with alone.pinned():
        expected = [draw(), draw()]
    mixed, other = GlobalRandom(3, CPU), GlobalRandom(4, CPU)
    got = []
    for _ in range(2):
        with mixed.pinned():
            got.append(draw())
        with other.pinned():
            draw()
        draw()
    assert got == expected


def test_two_requests_that_are_pinned_in_turn_each_continue_their_own_streams() -> None:
    alone = GlobalRandom(3, CPU)
    with alone.pinned():
        expected = [draw(), draw()]
    random.seed(1)
    torch.manual_seed(1)
    outside = draw()
    random.seed(1)
    torch.manual_seed(1)
    first, second = GlobalRandom(3, CPU), GlobalRandom(4, CPU)
    with first.pinned():
        got = [draw()]
        with first.unpinned(), second.pinned():
            others = [draw()]
            with second.unpinned():
                assert draw() == outside, "the state before both"
            others.append(draw())
        got.append(draw())
    assert got == expected
    with GlobalRandom(4, CPU).pinned():
        assert others == [draw(), draw()]


def test_unpinned_outside_of_pinned_does_nothing() -> None:
    torch.manual_seed(1)
    expected = draw()
    torch.manual_seed(1)
    random.seed(1)
    with GlobalRandom(2, CPU).unpinned():
        assert draw()[1] == expected[1]


def test_streams_are_those_of_the_plain_seed() -> None:
    with GlobalRandom(7, CPU).pinned():
        pinned = draw()
    random.seed(7)
    torch.manual_seed(7)
    assert pinned == draw()


def test_the_global_generators_are_left_as_they_were() -> None:
    random.seed(1)
    torch.manual_seed(1)
    expected = draw()
    random.seed(1)
    torch.manual_seed(1)
    with pytest.raises(ZeroDivisionError), GlobalRandom(2, CPU).pinned():
        draw()
        _ = 1 / 0
    assert draw() == expected
