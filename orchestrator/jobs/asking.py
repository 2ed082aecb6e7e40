"""What Slurm says of the jobs of runs: a job, all tasks of an array, or one task of an array of several runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.slurm.commands import FORGOTTEN, UNKNOWN, JobState, SlurmError, find_by_comment, job_states
from orchestrator.errors import PeerLost
from orchestrator.jobs.record import note_submission, read_submission

NOT_THERE = JobState("?", "NOT SUBMITTED")


def job_of(run_dir: Path) -> str | None:
    """The job id of a run, looked up by its mark where the answer to its submission was lost; None: Slurm has none.

    Raises:
        PeerLost: Slurm does not answer.
    """
    submission = read_submission(run_dir)
    if submission is None or submission.job_id is not None:
        return submission.job_id if submission else None
    try:
        found = find_by_comment(submission.mark)
    except SlurmError as error:
        raise PeerLost(f"Slurm does not answer: {error}", "the same command again") from error
    if found is None:
        return None
    job_id = found if submission.task is None else f"{found}_{submission.task}"
    note_submission(run_dir, dataclasses.replace(submission, job_id=job_id))
    return job_id


def states_of(runs: Sequence[Path]) -> dict[Path, list[JobState]]:
    """The states of the jobs of runs; every job and every array is asked for once.

    UNKNOWN where Slurm does not answer or has forgotten it.
    """
    asked: dict[str, list[JobState]] = {}
    found = {}
    for run in runs:
        try:
            job_id = job_of(run)
        except PeerLost as error:
            found[run] = [JobState("?", UNKNOWN, str(error))]
            continue
        if job_id is None:
            found[run] = [NOT_THERE]
            continue
        whole = job_id.partition("_")[0]
        if whole not in asked:
            asked[whole] = job_states(whole)
        found[run] = asked[whole] if whole == job_id else [_of_task(job_id, asked[whole])]
    return found


def _of_task(name: str, states: Sequence[JobState]) -> JobState:
    """What is said of one task; of the whole array where Slurm knows no tasks of it."""
    by_name: Mapping[str, JobState] = {one: state for state in states for one in task_names(state.job_id)}
    there = by_name.get(name) or by_name.get(name.partition("_")[0]) or JobState(name, UNKNOWN, FORGOTTEN)
    return dataclasses.replace(there, job_id=name)


def task_names(job_id: str) -> list[str]:
    """The tasks that Slurm means: those of an array that wait have one line together.

    Example:
        >>> task_names("12_1,4-6%2"), task_names("12_[0-4:2]"), task_names("12")
        (['12_1', '12_4', '12_5', '12_6'], ['12_0', '12_2', '12_4'], ['12'])
    """
    array, underscore, tasks = job_id.partition("_")
    names = []
    for part in tasks.strip("[]").partition("%")[0].split(",") if underscore else []:
        first, _, last = part.partition("-")
        last, _, step = last.partition(":")
        names += [f"{array}_{task}" for task in range(int(first), int(last or first) + 1, int(step or 1))]
    return names or [job_id]
