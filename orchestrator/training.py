"""What a rank trains with, and where a run stands."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.assemble import Room
from orchestrator.config.job import JobConfig
from orchestrator.data import TokenisedData
from orchestrator.metrics import Metrics
from orchestrator.pace import Pace
from orchestrator.planning.plan import Plan
from orchestrator.stragglers import Stragglers
from parallel.engine import Engine

if TYPE_CHECKING:
    from parallel.groups import Groups


@dataclass(frozen=True)
class Run:
    """Everything that a rank trains with. ``cpu_group`` carries CPU tensors; ``metrics`` is there on the first rank.

    ``guard``: raises when the run folder has become another launch's. ``base``: the fingerprint of an adapter's model.
    ``pace``: notes this rank's steps. ``stragglers``: finds ranks that hold the others up. ``name``: which of several
    runs in these processes it is.
    """

    job: JobConfig
    plan: Plan
    run_dir: Path
    groups: Groups
    cpu_group: Any
    engine: Engine
    data: TokenisedData
    room: Room
    metrics: Metrics | None
    guard: Callable[[], None] = lambda: None
    base: str | None = None
    pace: Pace | None = None
    stragglers: Stragglers | None = None
    name: str = ""

    def say(self, words: str) -> None:
        """Tell the user a line, from the first rank."""
        if self.metrics is not None:
            print(f"{self.name}: {words}" if self.name else words, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Cursor:
    """Where a run stands: after ``steps`` steps, at position ``samples`` of the order of its samples.

    ``losses``: of the newest steps (``orchestrator.anomalies``).
    """

    steps: int = 0
    samples: int = 0
    losses: tuple[float, ...] = field(default=(), repr=False)

    def after(self, step: int, global_sequences: int, losses: tuple[float, ...] = ()) -> Cursor:
        """Where it stands after ``step``, with so many samples in each step from here on, and these newest losses.

        Example:
            >>> Cursor(6, 24).after(7, 8)
            Cursor(steps=7, samples=32)
        """
        return Cursor(step, self.samples + (step - self.steps) * global_sequences, losses)
