"""Before anything starts: the points of a sweep composed, held against an earlier start, decided on, and planned."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from orchestrator.commands import Planned, run_folder
from orchestrator.config.building import as_override, blocking_differences, quote_override, read_job
from orchestrator.config.grid import Grid
from orchestrator.config.job import JobConfig
from orchestrator.config.loading import compose_points
from orchestrator.errors import ConfigError, ExitCode, IsotrainError
from orchestrator.runs import Decision, decide_train
from orchestrator.supervise import explain
from orchestrator.sweeps.book import FILE, Book, Metric, Point, Row, State, read_book
from orchestrator.sweeps.measuring import measured

HYDRAS = "hydra"  # the folder of a sweeper's own files
BESIDE = {".lock", HYDRAS}  # what may lie in a folder before the sweep's own file does
MOST_LINES = 12  # of differences that are listed
Result = TypeVar("Result")


@dataclass(frozen=True)
class PlannedPoint:
    """``job``: None where the words are no job. ``planned``: None where it is impossible or finished.

    ``reason``: why it is impossible; empty where it is not.
    """

    point: Point
    run_dir: Path
    job: JobConfig | None
    decision: Decision | None = None
    planned: Planned | None = None
    reason: str = ""

    @property
    def state(self) -> State:
        """What a sweep that starts now says of it."""
        if self.reason:
            return "pruned"
        return "done" if self.decision is not None and self.decision.kind == "finished" else "waiting"


@dataclass(frozen=True)
class PlannedSweep:
    """A sweep as it would run; nothing has been done yet. ``words``: those that start it again.

    ``earlier``: points of a sweep that grows which are not among these.
    """

    folder: Path
    words: tuple[str, ...]
    points: tuple[PlannedPoint, ...]
    earlier: tuple[Row, ...] = ()

    @property
    def waiting(self) -> list[PlannedPoint]:
        """The points that there is something to do for."""
        return [one for one in self.points if one.state == "waiting"]

    def book(self, metric: Metric) -> Book:
        """The book of a sweep that starts now."""
        rows = [
            measured(Row(one.point, one.state, one.reason, steps=one.job.steps if one.job else 0), one.run_dir, metric)
            for one in self.points
        ]
        earlier = [measured(row, self.folder / row.point.folder, metric) for row in self.earlier]
        return Book(self.words, metric, tuple(sorted([*rows, *earlier], key=lambda row: row.point.number)))


PlanPoint = Callable[[JobConfig, Decision], Planned]


def plan_sweep(words: Sequence[str], grid: Grid, plan_point: PlanPoint, may_grow: bool = False) -> PlannedSweep:
    """Compose and plan every point; nothing is started and nothing is written.

    A folder that holds this sweep already keeps its points' numbers and folders.

    Args:
        words: as they were typed.
        grid: what they stand for.
        plan_point: plans one job for where it will run; what it refuses is a point that is left out.
        may_grow: points that the folder does not have yet are new ones of the same sweep.
    Raises:
        ConfigError: no point can work (the first one's reason), or the folder holds something else, or another sweep
            (the differences are listed).
    """
    composed = compose_points(grid.common, grid.points)
    folder = _folder_of(composed)
    book = read_book(folder)
    points = _numbered(grid.points, book)
    placed = [
        PlannedPoint(point, folder / point.folder, None, reason=_first_line(job))
        if isinstance(job, Exception)
        else _placed(point, folder, job)
        for point, job in zip(points, composed, strict=True)
    ]
    if book is not None:
        _check_same(folder, book, placed, may_grow)
    decided = [_decided(one, plan_point) for one in placed]
    errors = [] if may_grow else [error for _, error in decided if error is not None]
    errors = [job for job in composed if isinstance(job, Exception)] + errors
    if len(errors) == len(points):
        raise errors[0]
    again = [word for word in words if not word.lstrip("+").startswith("run_dir=")]
    again.append(f"run_dir={as_override(str(folder))}")
    ordered = sorted((one for one, _ in decided), key=lambda one: one.point.number)
    earlier = [row for row in book.rows if row.point not in points] if book is not None else []
    return PlannedSweep(folder, tuple(again), tuple(ordered), tuple(earlier))


def words_of_folders(words: Sequence[str]) -> list[str]:
    """The words, with those of an earlier sweep in place of its folder's name."""
    found: list[str] = []
    for word in words:
        book = read_book(Path(word).expanduser()) if "=" not in word else None
        found += book.words if book is not None else [word]
    return found


def _or_error(work: Callable[..., Result], *values: object) -> Result | Exception:
    """What ``work`` gives, or the error of a job that cannot work; other errors are raised."""
    try:
        return work(*values)
    except (IsotrainError, ValueError) as error:
        if explain(error).code != ExitCode.CONFIG:
            raise
        return error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _folder_of(composed: Sequence[JobConfig | ConfigError]) -> Path:
    """The folder of the sweep: what all its jobs call ``run_dir``.

    Raises:
        ConfigError: they call it differently, or it holds no sweep. The first job's error where none composes.
    """
    jobs = [job for job in composed if isinstance(job, JobConfig)]
    if not jobs:
        raise next(job for job in composed if isinstance(job, ConfigError))
    folders = sorted({job.run_dir or "" for job in jobs})
    if len(folders) > 1:
        raise ConfigError(
            f"run_dir differs from point to point ({folders[0]}, {folders[1]}): it is the folder of the whole sweep",
            "run_dir=runs/NAME   (each point gets a folder in it)",
        )
    folder = sweep_folder(jobs[0])
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"run_dir={folder} is a file", "run_dir=ANOTHER")
    if folder.is_dir() and not (folder / FILE).is_file() and {file.name for file in folder.iterdir()} - BESIDE:
        raise ConfigError(f"run_dir={folder} is not empty and holds no sweep (no {FILE})", "run_dir=ANOTHER")
    return folder


def sweep_folder(job: JobConfig) -> Path:
    """Where a sweep of this job is kept: its ``run_dir``, or a new folder in ``runs/``."""
    folder = run_folder(job)
    return folder if job.run_dir else folder.with_name(f"sweep-{folder.name}")


def _numbered(swept: Sequence[tuple[str, ...]], book: Book | None) -> list[Point]:
    """Points with the numbers that they have in the book; new ones come after its last."""
    known = {row.point.overrides: row.point.number for row in book.rows} if book else {}
    following = iter(range(max(known.values(), default=-1) + 1, len(known) + len(swept) + 1))
    return [Point(known[one] if one in known else next(following), one) for one in swept]


def _placed(point: Point, folder: Path, job: JobConfig) -> PlannedPoint:
    run_dir = folder / point.folder
    return PlannedPoint(point, run_dir, dataclasses.replace(job, run_dir=str(run_dir)))


def _check_same(folder: Path, book: Book, placed: Sequence[PlannedPoint], may_grow: bool) -> None:
    """Refuse to go on with another sweep than the folder's.

    Raises:
        ConfigError: lists the differences.
    """
    before = {row.point.overrides: row.point for row in book.rows}
    now = {one.point.overrides: one.point for one in placed}
    lines = []
    if not may_grow:
        lines += [f"no longer a point: {point.words}" for key, point in before.items() if key not in now]
        lines += [f"a new point: {point.words}" for key, point in now.items() if key not in before]
    for one in placed:
        if one.job is not None and (one.run_dir / "job.yaml").is_file():
            changed = blocking_differences(read_job(one.run_dir), one.job)
            lines += [f"{key}: {as_override(old)} -> {as_override(new)}" for key, old, new in changed]
    lines = list(dict.fromkeys(lines))
    if not lines:
        return
    more = [f"and {len(lines) - MOST_LINES} more"] if len(lines) > MOST_LINES else []
    listed = "\n".join(f"  {line}" for line in [*lines[:MOST_LINES], *more])
    raise ConfigError(
        f"run_dir={folder} holds another sweep; it differs in\n{listed}",
        f"isotrain sweep {shlex.join(book.words)}   or   {quote_override('run_dir', 'ANOTHER')}",
    )


def _decided(one: PlannedPoint, plan_point: PlanPoint) -> tuple[PlannedPoint, Exception | None]:
    """The point with what will happen to it, and the error that speaks against it."""
    if one.job is None:
        return one, None
    decision = decide_train(one.run_dir, one.job)
    if decision.kind == "finished":
        return dataclasses.replace(one, decision=decision), None
    planned = _or_error(plan_point, one.job, decision)
    if isinstance(planned, Exception):
        return dataclasses.replace(one, reason=_first_line(planned)), planned
    return dataclasses.replace(one, decision=decision, planned=planned), None
