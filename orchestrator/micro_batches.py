"""``batch.micro_sequences=auto``: the size of a micro-batch is found while training; no number depends on it.

A run starts with the plan's size. Where memory is idle the next larger one is tried for a few of the first steps, and
kept if it is faster. Where memory runs out, whoever starts the ranks again lets them use the next smaller one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from orchestrator.runs import write_whole

STEPS_OF_A_TRIAL = 3  # the first warms up, the others count
FASTER, FULL = 0.97, 0.9
"""A larger size is kept if it needs at most so much of the time, and tried if memory is then at most so full."""


@dataclass(frozen=True)
class Size:
    """Rows of a micro-batch, and whether no other is to be tried."""

    rows: int
    settled: bool = False


def size_file(run_dir: Path) -> Path:
    """Where a run keeps the size that it found."""
    return run_dir / "micro_batches.json"


def read_size(run_dir: Path, choices: Sequence[int], planned: int) -> Size:
    """What an earlier launch found, where it is one of the ``choices``; else what is planned."""
    file = size_file(run_dir)
    if file.is_file():
        known = Size(**json.loads(file.read_text(encoding="utf-8")))
        if known.rows in choices:
            return known
    return Size(planned, settled=len(choices) < 2)


def write_size(run_dir: Path, size: Size) -> None:
    """Keep a size for later launches, and for whoever starts the ranks again."""
    write_whole(size_file(run_dir), json.dumps(asdict(size)) + "\n")


def smaller(run_dir: Path, choices: Sequence[int], planned: int) -> int | None:
    """Memory ran out: settle on the next smaller size, and say which; None: there is none, or it is not to be found."""
    now = read_size(run_dir, choices, planned).rows
    less = max((rows for rows in choices if rows < now), default=None)
    if less is not None:
        write_size(run_dir, Size(less, settled=True))
    return less


class MicroBatches:
    """The size in use. Every rank has one and all come to the same answer, for they are told the same numbers.

    Args:
        choices: sizes that the topology and the batch allow; empty: only ``start``.
        memory_bytes: what a rank has.
    """

    def __init__(self, choices: Sequence[int], start: Size, memory_bytes: float) -> None:
        self._choices = sorted(choices)
        self._memory_bytes = memory_bytes
        self.size = start
        self._steps = 0
        self._paces: list[float] = []
        self._before: tuple[int, float] | None = None  # the size before this one, and its pace

    def heard(self, step_s: float, peak_bytes: float, tokens: int) -> bool:
        """A step has taken so long and so much memory, on the rank that took most; whether the size is another now.

        Args:
            tokens: of the step, over all ranks.
        """
        if self.size.settled:
            return False
        self._steps += 1
        if self._steps > 1:
            self._paces.append(step_s / tokens)
        if self._steps < STEPS_OF_A_TRIAL:
            return False
        pace, rows = min(self._paces), self.size.rows
        self._steps, self._paces = 0, []
        if self._before is not None and pace > FASTER * self._before[1]:
            self.size = Size(self._before[0], settled=True)
            return True
        self._before = (rows, pace)
        larger = next((choice for choice in self._choices if choice > rows), None)
        if larger is None or peak_bytes * larger / rows > FULL * self._memory_bytes:
            self.size = Size(rows, settled=True)
        else:
            self.size = Size(larger)
        return True
