"""Ranks that are lost are started again from the newest checkpoint, as long as that brings new ones."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

from launch.exits import INTERNAL, RankExit
from launch.watch import Patience
from orchestrator.config.job import RecoveryConfig
from orchestrator.history import note_launch
from orchestrator.micro_batches import smaller
from orchestrator.planning.plan import Plan
from orchestrator.runs import latest_step

REWOUND, OUT_OF_MEMORY = "Rewound", "OutOfMemory"
# Ends of a rank that another try may not meet again: it was killed, crashed, lost a peer, hangs, or leaves data out.
WORTH_ANOTHER_TRY = frozenset({"Killed", "Crash", "PeerLost", "Silent", "Stalled", "Launcher", REWOUND})


class Ending(Protocol):
    """How one start of all ranks ended: its exit code, and the first cause, None when all is done."""

    @property
    def code(self) -> int: ...

    @property
    def cause(self) -> RankExit | None: ...


End = TypeVar("End", bound=Ending)


def run_ranks(
    start: Callable[[int], End],
    run_dir: Path,
    restarts: int,
    say: Callable[[str], None],
    is_stopping: Callable[[End], bool],
    completed: Callable[[], int] | None = None,
) -> tuple[End, str]:
    """Start all ranks, and again after an end that another try may not meet, until that makes no progress.

    Args:
        start: starts the ranks for the n-th time, counted from 0, and waits for their end.
        run_dir: the run folder.
        restarts: how often without a new checkpoint in between; 0: never.
        say: tells the user something, in one line.
        is_stopping: whether somebody has asked this start to end.
        completed: steps that are saved; None: what the run's newest checkpoint holds.
    Returns:
        How the last start ended, and why there was no further one though it might have helped; empty: it would not.
    """
    saved = completed or (lambda: latest_step(run_dir) or 0)
    tries = Tries(restarts, saved())
    attempt = 0
    while True:
        started = time.time()
        end = start(attempt)
        attempt += 1
        note_launch(run_dir, started, end.code, end.cause)
        if restarts == 0 or is_stopping(end) or end.cause is None:
            return end, ""
        step = saved()
        if end.cause.cause == OUT_OF_MEMORY and (rows := with_smaller_micro_batches(run_dir)):
            say(f"{end.cause.message}; starting again from step {step} with batch.micro_sequences={rows}")
            continue
        if not is_worth_another_try(end.cause):
            return end, ""
        if not tries.again(step):
            times = f"{restarts + 1} times without a new checkpoint after step {step}"
            return end, f"{end.cause.message}; {times}: given up"
        say(f"{end.cause.message}; starting again from step {step}")


def with_smaller_micro_batches(run_dir: Path) -> int | None:
    """The rows of a micro-batch that the next start will use; None: the job leaves no choice, or none is smaller."""
    plan = Plan.from_json((run_dir / "plan.json").read_text(encoding="utf-8"))
    return smaller(run_dir, plan.micro_choices, plan.micro_sequences)


def patience(recovery: RecoveryConfig) -> Patience:
    """How long a silent rank and a launch without a new step are borne."""
    return Patience(silent_s=recovery.silent_s, stalled_s=recovery.stalled_s)


def progress(run_dir: Path) -> object:
    """Changes with every step."""
    try:
        return (run_dir / "metrics.jsonl").stat().st_size
    except FileNotFoundError:
        return 0


class Tries:
    """Counts starts that brought no new checkpoint.

    Example:
        >>> tries = Tries(1, step=0)
        >>> [tries.again(step) for step in (5, 5, 5)]
        [True, True, False]
    """

    def __init__(self, limit: int, step: int) -> None:
        self._limit = limit
        self._step = step
        self._in_vain = 0

    def again(self, step: int) -> bool:
        """Whether to start once more, now that the newest checkpoint holds ``step`` steps."""
        self._in_vain = self._in_vain + 1 if step <= self._step else 0
        self._step = max(step, self._step)
        return self._in_vain <= self._limit


def is_worth_another_try(cause: RankExit | None) -> bool:
    """Whether the first cause is one that may not come again.

    Example:
        >>> is_worth_another_try(RankExit(2, 86, "Killed", "rank 2 was killed", "", None, 0.0))
        True
        >>> is_worth_another_try(RankExit(2, 64, "ConfigError", "steps=0", "", None, 0.0)), is_worth_another_try(None)
        (False, False)
    """
    if cause is None or (cause.cause == "Launcher" and cause.code == INTERNAL):  # torchrun could not start
        return False
    return cause.cause in WORTH_ANOTHER_TRY
