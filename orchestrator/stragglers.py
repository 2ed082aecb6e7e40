"""Ranks that hold the others up: whose own work takes longer than that of ranks with the same part of the model.

Ranks wait for each other inside of every step, so that all steps take equally long; what tells is how much of its time
a rank does *not* wait. A thread looks many times a second at what the main thread does. Every ``EVERY_STEPS`` steps
the ranks tell each other, in the message that asks whether to stop anyway. On a GPU the waiting is the device's, which
this does not see: nobody is named there.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType

from orchestrator.telling import is_waiting

LOOK_EVERY_S = 0.02
EVERY_STEPS = 10
LEAST_S = 2.0  # of a window: 100 looks
FACTOR, SHARE, LEAST_GAP_S = 1.5, 0.15, 0.02
"""A slow rank works so many times as long as its likes, and that by so much of a step, and by so much."""


class OwnTime:
    """Counts how many of its looks found the main thread at work, and how many found it waiting for other ranks."""

    def __init__(self, frame: Callable[[], FrameType | None] | None = None) -> None:
        self._frame = frame or _main_frame
        self._working = 0
        self._looks = 0
        self._since = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="own-time", daemon=True)

    def __enter__(self) -> OwnTime:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def take(self) -> tuple[float, float]:
        """Seconds of work of its own, and all seconds, since this was last asked."""
        working, looks, now = self._working, self._looks, time.monotonic()
        passed = now - self._since
        self._working, self._looks, self._since = 0, 0, now
        return (passed * working / looks if looks else 0.0), passed

    def _watch(self) -> None:
        while not self._ended.wait(LOOK_EVERY_S):
            frame = self._frame()
            if frame is not None:
                self._working += not is_waiting(frame)
                self._looks += 1


def _main_frame() -> FrameType | None:
    return sys._current_frames().get(threading.main_thread().ident or 0)


@dataclass(frozen=True)
class Slow:
    """A rank that holds others up: seconds of own work in a step, and those of the ranks like it (median)."""

    rank: int
    own_s: float
    likes_s: float

    def words(self, host: str) -> str:
        """What the user is told.

        Example:
            >>> Slow(2, 0.4, 0.1).words("node3")
            'rank 2 (node3) works 0.400 s in a step, ranks with the same part of the model 0.100 s: it holds them up'
        """
        where = f" ({host})" if host else ""
        return (
            f"rank {self.rank}{where} works {self.own_s:.3f} s in a step, ranks with the same part of the model "
            f"{self.likes_s:.3f} s: it holds them up"
        )


def slow_ranks(own_s: Sequence[float], step_s: float, likes: Sequence[Sequence[int]]) -> list[Slow]:
    """Which ranks are slow by seconds of own work in a step.

    Args:
        own_s: by rank; step_s: of a whole step.
        likes: groups of ranks with equal work.
    Example:
        >>> slow_ranks([0.1, 0.1, 0.4, 0.1], 0.5, [[0, 1, 2, 3]])
        [Slow(rank=2, own_s=0.4, likes_s=0.1)]
    """
    found = []
    for group in likes:
        usual = statistics.median_low(own_s[rank] for rank in group)
        bound = max(FACTOR * usual, usual + SHARE * step_s, usual + LEAST_GAP_S)
        found += [Slow(rank, own_s[rank], usual) for rank in group if own_s[rank] > bound]
    return found


class Stragglers:
    """Gathers what the ranks of a run tell of themselves; all ranks come to the same answer.

    Args:
        rank: this one. likes: groups of ranks with equal work.
        own: counts this rank's time.
    """

    def __init__(self, rank: int, ranks: int, likes: Sequence[Sequence[int]], own: OwnTime) -> None:
        self._rank, self._ranks, self._likes, self._own = rank, ranks, likes, own
        self._own_s, self._passed_s, self._steps = [0.0] * ranks, 0.0, 0
        self._suspects: set[int] = set()
        self._named: set[int] = set()

    def numbers(self, step: int) -> list[float]:
        """What this rank tells after a step, for a maximum over all ranks: nothing after most steps."""
        if step % EVERY_STEPS:
            return []
        own_s, passed_s = self._own.take()
        return [own_s if rank == self._rank else 0.0 for rank in range(self._ranks)] + [passed_s]

    def heard(self, numbers: Sequence[float]) -> list[Slow]:
        """Those to name now: slow in two windows in a row, and not named since they were slow before."""
        if not numbers:
            return []
        self._own_s = [one + more for one, more in zip(self._own_s, numbers[:-1], strict=True)]
        self._passed_s += numbers[-1]
        self._steps += EVERY_STEPS
        if self._passed_s < LEAST_S:
            return []
        each = [own_s / self._steps for own_s in self._own_s]
        slow = {one.rank: one for one in slow_ranks(each, self._passed_s / self._steps, self._likes)}
        again = self._suspects & slow.keys()
        new = [slow[rank] for rank in sorted(again - self._named)]
        self._suspects, self._named = set(slow), (self._named | again) & slow.keys()
        self._own_s, self._passed_s, self._steps = [0.0] * self._ranks, 0.0, 0
        return new
