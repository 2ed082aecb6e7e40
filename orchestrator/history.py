"""History: how each launch of a run ended, a line for each in ``launches.jsonl``, written by whoever waited for it."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from launch.exits import RankExit
from orchestrator.errors import DataError
from orchestrator.planning.compare import read_plan
from orchestrator.runs import latest_step


@dataclass(frozen=True)
class Launch:
    """One launch of a run's ranks.

    Args:
        started, ended: unix seconds.
        code: the exit code; ``cause`` is one word, such as done or Killed, and ``rank`` whose word it is.
        step: optimizer steps that the newest checkpoint held at its end.
        ranks, topology: what ran.
    """

    started: float
    ended: float
    code: int
    cause: str
    rank: int | None
    message: str
    step: int
    ranks: int
    topology: str


def history_file(run_dir: Path) -> Path:
    """Where the launches of a run are written down."""
    return run_dir / "launches.jsonl"


def note_launch(run_dir: Path, started: float, code: int, cause: RankExit | None) -> None:
    """Write down that a launch of what ``plan.json`` says has ended now.

    A disk that takes nothing more, or a damaged folder, is no reason to end otherwise.
    """
    with suppress(OSError, DataError):
        plan = read_plan(run_dir / "plan.json")
        launch = Launch(
            started=started,
            ended=time.time(),
            code=int(code),
            cause=cause.cause if cause else "Aborted" if code else "done",
            rank=cause.rank if cause else None,
            message=cause.message if cause else "",
            step=latest_step(run_dir) or 0,
            ranks=plan.ranks_used,
            topology=str(plan.topology),
        )
        with history_file(run_dir).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(launch)) + "\n")
