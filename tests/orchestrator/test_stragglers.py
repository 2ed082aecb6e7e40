"""Who holds the others up is named once, and nobody is named for nothing."""

from __future__ import annotations

import sys
import time
from types import FrameType

import pytest

from orchestrator.stragglers import EVERY_STEPS, OwnTime, Stragglers, slow_ranks


class Fixed(OwnTime):
    """A rank that works so many seconds of each window of 5 seconds."""

    def __init__(self, own_s: float) -> None:
        super().__init__()
        self.own_s = own_s

    def take(self) -> tuple[float, float]:
        return self.own_s, 5.0


def tell_each_other(ranks: list[Stragglers], step: int) -> list[list[int]]:
    """One message; whom each rank names."""
    numbers = [rank.numbers(step) for rank in ranks]
    most = [max(column) for column in zip(*numbers, strict=True)]
    return [[slow.rank for slow in rank.heard(most)] for rank in ranks]


def test_a_rank_is_named_by_all_when_it_is_slow_in_two_windows_and_only_once() -> None:
    owns = [Fixed(1.0), Fixed(1.1), Fixed(4.0), Fixed(1.0)]
    ranks = [Stragglers(rank, 4, [(0, 1, 2, 3)], own) for rank, own in enumerate(owns)]
    assert tell_each_other(ranks, EVERY_STEPS - 1) == [[]] * 4  # nothing is told after most steps
    assert tell_each_other(ranks, EVERY_STEPS) == [[]] * 4
    assert tell_each_other(ranks, 2 * EVERY_STEPS) == [[2]] * 4
    assert tell_each_other(ranks, 3 * EVERY_STEPS) == [[]] * 4
    owns[2].own_s = 1.0
    assert tell_each_other(ranks, 4 * EVERY_STEPS) == [[]] * 4
    owns[2].own_s = 4.0
    assert tell_each_other(ranks, 5 * EVERY_STEPS) == [[]] * 4
    assert tell_each_other(ranks, 6 * EVERY_STEPS) == [[2]] * 4  # again, after it was not


def test_stages_are_not_compared_with_each_other() -> None:
    assert slow_ranks([0.1, 0.1, 0.4, 0.4], 0.5, [(0, 1), (2, 3)]) == []
    assert [slow.rank for slow in slow_ranks([0.1, 0.1, 0.4, 0.9], 1.0, [(0, 1), (2, 3)])] == [3]
    assert slow_ranks([0.1, 0.9], 1.0, [(0,), (1,)]) == []


@pytest.mark.parametrize("own_s", [[0.100, 0.115], [0.010, 0.029]])
def test_little_is_not_slow(own_s: list[float]) -> None:
    assert slow_ranks(own_s, 0.1, [(0, 1)]) == []


def test_windows_of_quick_steps_are_put_together() -> None:
    own = Fixed(0.5)
    own.take = lambda: (0.5, 0.9)  # type: ignore[method-assign]
    alone = Stragglers(0, 2, [(0, 1)], own)
    assert [alone.heard([0.5, 0.1, 0.9]) for _ in range(5)] == [[]] * 5  # one window of 2.7 s, and most of another
    assert [slow.rank for slow in alone.heard([0.5, 0.1, 0.9])] == [0]


def test_own_time_is_the_share_of_looks_that_find_no_wait() -> None:
    waiting: list[FrameType] = []

    def look() -> FrameType:
        looks.append(1)
        return waiting[0] if len(looks) % 4 else sys._getframe()

    def all_reduce(group: object) -> FrameType:
        return sys._getframe()

    source = compile("def all_reduce(frame, group=None):\n    return frame()\n", "distributed_c10d.py", "exec")
    space: dict[str, object] = {}
    exec(source, space)
    waiting.append(space["all_reduce"](lambda: sys._getframe(1)))  # type: ignore[operator]
    looks: list[int] = []
    with OwnTime(look) as own:
        while len(looks) < 8:
            time.sleep(0.01)
        own_s, passed_s = own.take()
    assert 0 < own_s < 0.5 * passed_s
