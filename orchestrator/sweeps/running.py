"""The points of a sweep on this machine, one or several at a time: each a command ``isotrain train`` of its own, or
several of them one command that trains them together."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from launch.environment import crowding, rank_variables, usable_cores, visible_devices
from launch.many import Task, TaskEnd, run_tasks
from orchestrator.commands import Planned, Say, make_folder, plan_job, rendered_launch
from orchestrator.config.building import job_to_yaml
from orchestrator.config.job import JobConfig
from orchestrator.errors import ConfigError, ExitCode
from orchestrator.locking import locked
from orchestrator.runs import latest_step, write_whole
from orchestrator.sweeps.book import Book, Metric, Row, write_book
from orchestrator.sweeps.bundle import bundle_folder, write_bundle
from orchestrator.sweeps.measuring import measured
from orchestrator.sweeps.planning import PlannedPoint, PlannedSweep
from orchestrator.sweeps.sharing import Together, launches

STOPPED = (int(ExitCode.INTERRUPTED), int(ExitCode.ABORTED), -int(signal.SIGTERM))


def plan_here(job: JobConfig) -> Planned:
    """The plan of a point that is trained on this machine.

    Raises:
        ConfigError, SpecError, LaunchError: it cannot work; says why.
    """
    planned = plan_job(job)
    rendered_launch(planned, Path(job.run_dir or ""))
    return planned


def run_here(sweep: PlannedSweep, metric: Metric, jobs: int, say: Say) -> tuple[Book, int]:
    """Train all points that wait, ``jobs`` at a time; the book of it lies in the folder and is written as it changes.

    A point that fails is said, and the others go on. The first Ctrl-C lets those that run save, and starts no more.

    Returns:
        The book, and the exit code: 85 or 130 after Ctrl-C, 1 where a point failed, else 0.
    Raises:
        ConfigError: the folder is taken, or there are not as many GPUs.
    """
    waiting = sweep.waiting
    together = launches(waiting)
    places = shares(waiting, min(jobs, len(together)))
    if warning := crowded(waiting, len(places)):
        say(warning)
    make_folder(sweep.folder)
    with locked(sweep.folder):
        for one in waiting:
            _write_job(one)
        tasks = {_task_of(sweep.folder, one): one.numbers for one in together}
        record = _Record(sweep, metric, say, {task.name: numbers for task, numbers in tasks.items()})
        stops = run_tasks(list(tasks), places, record.began, record.ended, say)
    if stops:
        return record.book, int(ExitCode.INTERRUPTED if stops == 1 else ExitCode.ABORTED)
    return record.book, exit_code(sweep, record.book)


def exit_code(sweep: PlannedSweep, book: Book) -> int:
    """What the ends of a sweep's points mean together: 85 where one was interrupted, 1 where one failed, else 0."""
    points = [one.point for one in sweep.points]
    states = {row.state for row in book.rows if row.point in points}
    if "interrupted" in states:
        return int(ExitCode.INTERRUPTED)
    return int(ExitCode.RED if "failed" in states else ExitCode.DONE)


def shares(waiting: Sequence[PlannedPoint], jobs: int) -> list[Mapping[str, str]]:
    """What each of ``jobs`` runs that train at once gets of this machine, as variables: cores, or GPUs of its own.

    Raises:
        ConfigError: the GPUs do not suffice.
    """
    if jobs < 2:
        return [{}] * jobs
    if ranks := _cpu_ranks(waiting):
        threads = rank_variables(jobs * ranks, usable_cores())
        return [{name: value for name, value in threads.items() if name == "OMP_NUM_THREADS"}] * jobs
    import torch

    per_run = max(one.planned.job.cluster.gpus_per_node for one in waiting if one.planned is not None)
    return gpu_shares(visible_devices(torch.cuda.device_count()), per_run, jobs)


def crowded(waiting: Sequence[PlannedPoint], jobs: int) -> str:
    """What to say where the user gives the ranks of ``jobs`` runs far more threads than there are cores; else empty."""
    ranks = _cpu_ranks(waiting)
    return crowding(jobs * ranks, usable_cores()) if ranks else ""


def _cpu_ranks(waiting: Sequence[PlannedPoint]) -> int:
    """The ranks of the largest run; 0 where there is none, or one needs a GPU."""
    plans = [one.planned for one in waiting if one.planned is not None]
    on_cpu = all(planned.job.cluster.device == "cpu" for planned in plans)
    return max((planned.plan.ranks_used for planned in plans), default=0) if on_cpu else 0


def gpu_shares(devices: Sequence[str], per_run: int, jobs: int) -> list[Mapping[str, str]]:
    """The GPUs of each of several runs at once.

    Raises:
        ConfigError: they do not suffice.
    Example:
        >>> gpu_shares(["0", "1", "2", "3"], per_run=2, jobs=2)
        [{'CUDA_VISIBLE_DEVICES': '0,1'}, {'CUDA_VISIBLE_DEVICES': '2,3'}]
    """
    if jobs * per_run > len(devices):
        raise ConfigError(
            f"--jobs {jobs} with cluster.gpus_per_node={per_run} takes {jobs * per_run} GPUs, but there are "
            f"{len(devices)}",
            f"--jobs {max(1, len(devices) // per_run)}",
        )
    first = range(0, jobs * per_run, per_run)
    return [{"CUDA_VISIBLE_DEVICES": ",".join(devices[place : place + per_run])} for place in first]


def _write_job(one: PlannedPoint) -> None:
    """The whole job of a point, as ``isotrain train`` reads it."""
    assert one.job is not None
    make_folder(one.run_dir)
    with locked(one.run_dir):
        write_whole(one.run_dir / "job.yaml", job_to_yaml(one.job))


def _task(one: PlannedPoint) -> Task:
    train = (sys.executable, "-m", "orchestrator", "train", str(one.run_dir / "job.yaml"), "--json")
    return Task(str(one.point.number), train, one.run_dir / "logs" / "train.log")


def _task_of(sweep: Path, together: Together) -> Task:
    """The command of a launch: that of its only point, or one for all of its points."""
    if len(together.points) == 1:
        return _task(together.points[0])
    folder = bundle_folder(sweep, together.numbers)
    for one in together.points:
        assert one.planned is not None
        write_whole(one.run_dir / "plan.json", one.planned.plan.to_json())
    write_bundle(folder, [one.run_dir for one in together.points])
    train = (sys.executable, "-m", "orchestrator", "together", str(folder), "--json")
    return Task(folder.name, train, folder / "logs" / "train.log")


class _Record:
    """The book while points run: brought up to date, written and said at each start and end.

    ``numbers``: of the points of each task, by its name.
    """

    def __init__(self, sweep: PlannedSweep, metric: Metric, say: Say, numbers: Mapping[str, Sequence[int]]) -> None:
        self.book = sweep.book(metric)
        self._folder = sweep.folder
        self._say = say
        self._numbers = numbers
        write_book(self._folder, self.book)

    def began(self, task: Task) -> None:
        """A point has started, or several."""
        for row in self._change(task, lambda row: dataclasses.replace(row, state="running")):
            self._say(f"point {row.point.number} started: {row.point.words}")

    def ended(self, task: Task, end: TaskEnd) -> None:
        """A point has ended, or several."""
        metric = self.book.metric.name
        for row in self._change(task, lambda row: self._measured(how_it_ended(row, self._end_of(task, row, end)))):
            words = f", {metric} {row.value:.4f}" if row.value is not None else ""
            why = f": {row.reason}" if row.reason else ""
            self._say(f"point {row.point.number} {row.state}{words}, {row.step} of {row.steps} steps{why}")

    def _measured(self, row: Row) -> Row:
        return measured(row, self._folder / row.point.folder, self.book.metric)

    def _end_of(self, task: Task, row: Row, end: TaskEnd) -> TaskEnd:
        """The end of one point of a task."""
        if len(self._numbers[task.name]) == 1:
            return end
        return end_of_point(self._folder / row.point.folder, row.steps, end)

    def _change(self, task: Task, change: Callable[[Row], Row]) -> list[Row]:
        numbers = self._numbers[task.name]
        rows = {row.point.number: change(row) if row.point.number in numbers else row for row in self.book.rows}
        self.book = dataclasses.replace(self.book, rows=tuple(rows.values()))
        write_book(self._folder, self.book)
        return [rows[number] for number in numbers]


def end_of_point(run_dir: Path, steps: int, end: TaskEnd) -> TaskEnd:
    """The end of one of several points that one command has trained: what that said of it or, where it was killed, as
    far as the point had come.
    """
    try:
        said = json.loads(end.said)["points"][run_dir.name]
        return TaskEnd(int(said["code"]), json.dumps(said))
    except (ValueError, KeyError, TypeError):
        return TaskEnd(0, "") if (latest_step(run_dir) or 0) >= steps else end


def how_it_ended(row: Row, end: TaskEnd) -> Row:
    """The row of a point whose command has ended.

    Example:
        >>> from orchestrator.sweeps.book import Point
        >>> row = how_it_ended(Row(Point(0, ("seed=1",)), "running"), TaskEnd(-9, ""))
        >>> row.state, row.code, row.reason
        ('failed', 137, 'killed by SIGKILL')
    """
    if end.code in STOPPED:
        code = int(ExitCode.INTERRUPTED) if end.code < 0 else end.code
        return dataclasses.replace(row, state="interrupted", code=code, reason="")
    if end.code < 0:
        words = f"killed by {signal.Signals(-end.code).name}"
        return dataclasses.replace(row, state="failed", code=128 - end.code, reason=words)
    if end.code:
        return dataclasses.replace(row, state="failed", code=end.code, reason=_said(end))
    return dataclasses.replace(row, state="done", code=0, reason="")


def _said(end: TaskEnd) -> str:
    """The first line of the error that a command has printed as JSON."""
    try:
        return str(json.loads(end.said)["error"]).splitlines()[0]
    except (ValueError, KeyError, TypeError, IndexError):
        return "see its logs/train.log"
