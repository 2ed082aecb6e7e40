"""The points of a sweep on Slurm: tasks of one job array, each a run like any other that was submitted."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from launch.slurm.commands import JobState
from orchestrator.commands import Planned, Say, make_folder
from orchestrator.config.job import ClusterConfig, JobConfig, SlurmConfig
from orchestrator.detection.cluster import as_asked
from orchestrator.errors import ConfigError, ExitCode, PeerLost
from orchestrator.jobs.asking import states_of
from orchestrator.jobs.record import add_tasks, note_submission, read_ended, slurm_folder, write_submission
from orchestrator.jobs.submit import (
    ON_RANKS,
    forget_earlier,
    hand_over,
    header,
    new_submission,
    plan_submission,
    script_of,
    write_script,
)
from orchestrator.locking import locked
from orchestrator.runs import write_run
from orchestrator.sweeps.book import Book, Metric, Row, write_book
from orchestrator.sweeps.planning import PlannedPoint, PlannedSweep


def is_slurms(cluster: ClusterConfig) -> bool:
    """Whether a cluster is one that ``isotrain submit`` is for: several nodes, or something is asked of Slurm.

    Example:
        >>> is_slurms(ClusterConfig(nodes=4)), is_slurms(ClusterConfig(gpus_per_node=8))
        (True, False)
    """
    return cluster.nodes > 1 or cluster.slurm != SlurmConfig()


def plan_on_slurm(job: JobConfig) -> Planned:
    """The plan of a point that is a task of an array.

    Raises:
        ConfigError, SpecError: it cannot work; says why.
    """
    if job.cluster.slurm.array is not None:
        raise ConfigError(f"cluster.slurm.array={job.cluster.slurm.array}: a sweep is an array itself", "--jobs N")
    if job.sweep.share_base:
        raise ConfigError(
            "sweep.share_base=true: on Slurm each point is a task of its own, with a base of its own",
            "sweep.share_base=false   or, inside of an allocation: cluster=auto",
        )
    return plan_submission(job)


def array_text(numbers: Sequence[int], at_once: int | None) -> str:
    """Task numbers as ``--array`` takes them.

    Example:
        >>> array_text([0, 1, 2, 5, 7, 8], at_once=2), array_text([4], None)
        ('0-2,5,7-8%2', '4')
    """
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    words = ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
    return words if at_once is None else f"{words}%{at_once}"


def array_script(sweep: PlannedSweep, points: Sequence[PlannedPoint], at_once: int | None) -> str:
    """The batch script of an array of some points: the text of any run's, with an array in its lines.

    Raises:
        ConfigError: points ask for different things of Slurm, and all tasks of an array get the same.
    """
    numbers = array_text([one.point.number for one in points], at_once)
    cluster = _cluster_of(points)
    return script_of(
        dataclasses.replace(cluster, slurm=dataclasses.replace(cluster.slurm, array=numbers)), sweep.folder
    )


def _cluster_of(points: Sequence[PlannedPoint]) -> ClusterConfig:
    clusters = [one.planned.job.cluster for one in points if one.planned is not None]
    first = _asked(clusters[0])
    for cluster in clusters:
        other = set(_asked(cluster)) ^ set(first)
        if other:
            raise ConfigError(
                f"all tasks of a job array get the same of Slurm, and the points differ in {', '.join(sorted(other))}",
                "a sweep for each: cluster.KEY=VALUE run_dir=ANOTHER",
            )
    return clusters[0]


def _asked(cluster: ClusterConfig) -> list[str]:
    prologue = cluster.slurm.prologue
    in_script = [] if prologue[:1] and prologue[0] in ON_RANKS else prologue
    return [*(line.removeprefix("#SBATCH ") for line in header(cluster, Path("sweep")).lines()), *in_script]


def submit_sweep(sweep: PlannedSweep, metric: Metric, at_once: int | None, say: Say) -> tuple[Book, str | None]:
    """Submit the points that wait and have no job that waits or runs, as one array.

    Returns:
        The book, and the id of the array; None where there was nothing to submit.
    Raises:
        ConfigError: Slurm refuses it (in Slurm's words), or somebody trains in a point's folder.
        PeerLost: Slurm does not answer.
    """
    make_folder(sweep.folder)
    slurm_folder(sweep.folder).mkdir(exist_ok=True)
    with locked(sweep.folder):  # two of these commands at once submit once
        write_book(sweep.folder, sweep.book(metric))
        missing = _missing(sweep.waiting)
        job_id = _submit(sweep, missing, at_once, say) if missing else None
        book = on_slurm(sweep, metric)
        write_book(sweep.folder, book)
    return book, job_id


def _missing(waiting: Sequence[PlannedPoint]) -> list[PlannedPoint]:
    """The points that no job is there for.

    Raises:
        PeerLost: Slurm does not say.
    """
    missing = []
    for run, states in states_of([one.run_dir for one in waiting]).items():
        silent = next((state for state in states if state.is_out_of_reach), None)
        if silent is not None:
            raise PeerLost(f"Slurm does not answer: {silent.reason}", "the same command again")
        if not any(state.is_active for state in states):
            missing.append(run)
    return [one for one in waiting if one.run_dir in missing]


def _submit(sweep: PlannedSweep, points: Sequence[PlannedPoint], at_once: int | None, say: Say) -> str:
    text, cluster = array_script(sweep, points, at_once), _cluster_of(points)
    for one in points:
        assert one.planned is not None
        make_folder(one.run_dir)
        with locked(one.run_dir):
            kept = as_asked(one.planned.job, one.job) if one.job else one.planned.job
            write_run(one.run_dir, kept, one.planned.plan.to_json())
            forget_earlier(one.run_dir)
    add_tasks(sweep.folder, {one.point.number: one.run_dir.name for one in points})
    script = write_script(sweep.folder, cluster, text)
    submission = new_submission()
    write_submission(sweep.folder, submission)
    tasks = {one.run_dir: dataclasses.replace(submission, task=one.point.number) for one in points}
    for run, task in tasks.items():
        note_submission(run, task)
    job_id = hand_over(sweep.folder, script, submission, cluster, say)
    write_submission(sweep.folder, dataclasses.replace(submission, job_id=job_id))
    for run, task in tasks.items():
        note_submission(run, dataclasses.replace(task, job_id=f"{job_id}_{task.task}"))
    return job_id


def on_slurm(sweep: PlannedSweep, metric: Metric) -> Book:
    """The book of a sweep whose points are, or were, jobs."""
    states = states_of([one.run_dir for one in sweep.waiting])
    rows = []
    for row in sweep.book(metric).rows:
        run_dir = sweep.folder / row.point.folder
        rows.append(_row(row, run_dir, states[run_dir][-1]) if run_dir in states else row)
    return Book(sweep.words, metric, tuple(rows))


def _row(row: Row, run_dir: Path, state: JobState) -> Row:
    ended = read_ended(run_dir)
    if state.is_active:
        reason = "" if state.reason == "None" else state.reason
        return dataclasses.replace(row, state="running" if state.state == "RUNNING" else "waiting", reason=reason)
    if ended is not None and ended.job_id == state.job_id and ended.code:
        stopped = ended.code == ExitCode.INTERRUPTED
        reason = "" if stopped else ended.message
        return dataclasses.replace(row, state="interrupted" if stopped else "failed", code=ended.code, reason=reason)
    if state.code:  # it left no word: Slurm's own are all there is
        return dataclasses.replace(row, state="failed", code=state.code, reason=state.state)
    return row
