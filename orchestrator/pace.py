"""Pace: how long a rank's steps take and what it holds, kept by the rank itself in one small file."""

from __future__ import annotations

import json
import os
import socket
import statistics
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

EVERY_S = 60.0
RECENT = 512
"""Steps that the figures are of: the newest."""


@dataclass(frozen=True)
class RankPace:
    """One rank's newest steps, since its last start.

    Args:
        steps: how many the figures are of, up to ``last_step``.
        least_s, median_s, most_s: of a step, from its first row to its end, waiting for others included.
        slowest_step: the one that took ``most_s``.
        wait_s: mean time that it waited at the end of a step until all others were there: who is last waits least.
        peak_memory_bytes: the most that it has held: resident, on a GPU what torch's allocator handed out.
    """

    rank: int
    host: str
    steps: int
    last_step: int
    least_s: float
    median_s: float
    most_s: float
    slowest_step: int
    wait_s: float
    peak_memory_bytes: int


def pace_file(run_dir: Path, rank: int) -> Path:
    """Where a rank keeps its pace."""
    return run_dir / "paces" / f"rank-{rank}.json"


class Pace:
    """Notes a rank's steps, and writes them down every minute and at the end: nothing is sent, nothing is waited for.

    Args:
        memory: the most bytes held so far.
        clock: seconds, for tests.
    """

    def __init__(
        self, run_dir: Path, rank: int, memory: Callable[[], int], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._file = pace_file(run_dir, rank)
        self._rank = rank
        self._memory = memory
        self._clock = clock
        self._written = clock()
        self._steps: deque[tuple[int, float, float]] = deque(maxlen=RECENT)

    def note(self, step: int, step_s: float, wait_s: float) -> None:
        """One step has ended."""
        self._steps.append((step, step_s, wait_s))
        if self._clock() - self._written >= EVERY_S:
            self.write()

    def write(self) -> None:
        """Replace the file; where the disk takes nothing, training goes on without it."""
        if not self._steps:
            return
        self._written = self._clock()
        times = [step_s for _, step_s, _ in self._steps]
        slowest = max(self._steps, key=lambda one: one[1])
        pace = RankPace(
            rank=self._rank,
            host=socket.gethostname(),
            steps=len(times),
            last_step=self._steps[-1][0],
            least_s=min(times),
            median_s=statistics.median(times),
            most_s=slowest[1],
            slowest_step=slowest[0],
            wait_s=statistics.fmean(wait_s for _, _, wait_s in self._steps),
            peak_memory_bytes=self._memory(),
        )
        with suppress(OSError):
            self._file.parent.mkdir(exist_ok=True)
            aside = self._file.with_name(f".{self._file.name}.{os.getpid()}")
            aside.write_text(json.dumps(asdict(pace)) + "\n", encoding="utf-8")
            aside.replace(self._file)
