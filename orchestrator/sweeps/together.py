"""Several points in one launch: their folders held, their ranks started, and how each of them has ended."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from launch.exits import clear_exits, first_cause, read_exits
from launch.launcher import render
from launch.local import LaunchResult, launch
from launch.request import LaunchRequest, Rendered
from orchestrator.config.building import read_job
from orchestrator.config.job import JobConfig
from orchestrator.errors import ExitCode
from orchestrator.history import note_launch
from orchestrator.locking import locked
from orchestrator.planning.compare import read_plan
from orchestrator.planning.plan import Plan
from orchestrator.recovery import patience, progress, run_ranks
from orchestrator.runs import latest_step, write_run
from orchestrator.sweeps.bundle import OF_ONE_POINT, is_over, read_bundle


@dataclass(frozen=True)
class PointEnd:
    """How a point has ended; ``error`` is empty where all is well."""

    code: int
    error: str = ""


@dataclass(frozen=True)
class _Bundle:
    folder: Path
    run_dirs: tuple[Path, ...]
    jobs: tuple[JobConfig, ...]
    plan: Plan

    @property
    def steps_saved(self) -> int:
        """Of all points together."""
        return sum(latest_step(run_dir) or 0 for run_dir in self.run_dirs)

    @property
    def blamed(self) -> list[Path]:
        """Points that have ended all ranks by a fault of their own."""
        causes = {run_dir: first_cause(read_exits(run_dir)) for run_dir in self.run_dirs}
        return [run_dir for run_dir, cause in causes.items() if cause is not None and cause.code in OF_ONE_POINT]

    @property
    def left(self) -> list[Path]:
        """Points that are not over."""
        return [run_dir for run_dir in self.run_dirs if not is_over(run_dir)]


def train_together(folder: Path, say: Callable[[str], None]) -> dict[str, PointEnd]:
    """Train the points of a launch's folder, from the start or each on from its newest checkpoint.

    A point whose own fault ends the ranks is left out, and they are started again for the others.

    Returns:
        The end of each point by the name of its folder.
    Raises:
        ConfigError: somebody trains in one of the folders. DataError: the folder says nothing, or a plan is damaged.
    """
    run_dirs = read_bundle(folder)
    jobs = tuple(read_job(run_dir) for run_dir in run_dirs)
    bundle = _Bundle(folder, run_dirs, jobs, read_plan(run_dirs[0] / "plan.json"))
    with ExitStack() as stack:
        for run_dir, job in zip(run_dirs, jobs, strict=True):
            stack.enter_context(locked(run_dir))
            write_run(run_dir, job, (run_dir / "plan.json").read_text(encoding="utf-8"))
            clear_exits(run_dir)
        (folder / "plan.json").write_text(bundle.plan.to_json(), encoding="utf-8")
        ends = _launches(bundle, say)
        _report(run_dirs)
    return ends


def _launches(bundle: _Bundle, say: Callable[[str], None]) -> dict[str, PointEnd]:
    rendered, recovery = _rendered(bundle), bundle.jobs[0].recovery
    while True:
        blamed = len(bundle.blamed)
        end, given_up = run_ranks(
            lambda attempt: _launch(rendered, bundle, say),
            bundle.folder,
            recovery.restarts,
            say,
            lambda end: end.stopped,
            lambda: bundle.steps_saved,
        )
        if end.stopped or len(bundle.blamed) == blamed or not bundle.left:
            break
        say(f"{bundle.blamed[-1].name} has ended; starting again with the other {len(bundle.left)}")
    message = given_up or (end.cause.message if end.cause else "ended at once")
    last = PointEnd(int(ExitCode.GAVE_UP) if given_up else end.code, message if end.code else "")
    return {run_dir.name: point_end(run_dir, last) for run_dir in bundle.run_dirs}


def _launch(rendered: Rendered, bundle: _Bundle, say: Callable[[str], None]) -> LaunchResult:
    """One start of all ranks, which is one of each point that is not over."""
    started, left = time.time(), bundle.left
    end = launch(
        rendered,
        bundle.folder,
        bundle.plan.ranks_used,
        say,
        patience(bundle.jobs[0].recovery),
        lambda: [progress(run_dir) for run_dir in bundle.run_dirs],
    )
    for run_dir in left:
        own = read_exits(run_dir)
        code, cause = (end.code, end.cause) if not own else (0, None)
        if own and (cause := first_cause(own)) is not None:
            code = cause.code
        note_launch(run_dir, started, code, cause)
    return end


def _rendered(bundle: _Bundle) -> Rendered:
    ranks, program = bundle.plan.ranks_used, (sys.executable, "-m", "orchestrator", "worker", str(bundle.folder))
    return render(LaunchRequest(bundle.folder, program, ranks, ranks_per_node=ranks, device=bundle.plan.device))


def point_end(run_dir: Path, launch: PointEnd) -> PointEnd:
    """How a point has ended, by its own word or, where it left none, as its launch."""
    exits = read_exits(run_dir)
    cause = first_cause(exits)
    if cause is not None:
        return PointEnd(cause.code, cause.message)
    return PointEnd(0) if exits else launch


def _report(run_dirs: Sequence[Path]) -> None:
    from orchestrator.pages.run_page import report_end

    for run_dir in run_dirs:
        report_end(run_dir)
