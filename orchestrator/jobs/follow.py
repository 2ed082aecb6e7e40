"""``isotrain status``, ``wait``, ``cancel``, ``logs``: what Slurm says of a run's job, and what its folder says."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.slurm.commands import FORGOTTEN, UNKNOWN, JobState, SlurmError, cancel, find_by_comment, job_states
from orchestrator.config.building import read_job
from orchestrator.errors import ConfigError, ExitCode, PeerLost
from orchestrator.jobs.record import (
    read_ended,
    read_submission,
    slurm_folder,
    submitted_runs,
    write_cancelled,
    write_submission,
)
from orchestrator.runs import latest_step
from orchestrator.supervise import last_logged_step

ASK_EVERY_S = 2.0


@dataclass(frozen=True)
class Status:
    """One run's job. ``step``: the last one logged, of ``steps``; ``saved``: steps that the newest checkpoint holds.

    ``code``: the exit code where the job has ended and it is known.
    """

    run_dir: Path
    job_id: str
    state: str
    reason: str
    nodes: str
    step: int
    saved: int
    steps: int
    code: int | None

    @property
    def is_over(self) -> bool:
        """Whether nothing more will happen."""
        state = JobState(self.job_id, self.state, self.reason)
        return not state.is_active and not state.is_out_of_reach

    @property
    def exit_code(self) -> int:
        """What the job's end means, as an exit code: 0 only when it is completed."""
        if self.state == "COMPLETED":
            return 0
        return self.code or int(ExitCode.GAVE_UP if self.state == "CANCELLED" else ExitCode.PEER_LOST)


def chosen_runs(words: Sequence[str]) -> list[Path]:
    """The run folders that were named; ``all``: every one submitted from this account.

    Raises:
        ConfigError: a folder has no Slurm job, or there is none at all.
    """
    if "all" in words:
        return submitted_runs()
    folders = [Path(word).expanduser().absolute() for word in words]
    for folder in folders:
        if read_submission(folder) is None:
            raise ConfigError(f"{folder} has no job of Slurm's", f"isotrain submit ... run_dir={folder}")
    return folders


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
    if found is not None:
        write_submission(run_dir, dataclasses.replace(submission, job_id=found))
    return found


def statuses(run_dir: Path) -> list[Status]:
    """A run's job, or every task of its array.

    Where Slurm has forgotten the job, what the run itself has written at its end counts; where Slurm does not answer,
    the state is UNKNOWN.
    """
    try:
        job_id = job_of(run_dir)
        states = job_states(job_id) if job_id else [JobState("?", "NOT SUBMITTED")]
    except PeerLost as error:
        states = [JobState("?", UNKNOWN, str(error))]
    job, ended = read_job(run_dir), read_ended(run_dir)
    found = []
    for state in states:
        mine = ended if ended and ended.job_id == state.job_id and not ended.requeued else None
        if mine and state.state == UNKNOWN and state.reason == FORGOTTEN:
            state = dataclasses.replace(
                state, state="COMPLETED" if mine.code == 0 else "FAILED", reason="", code=mine.code
            )
        words = mine.message if mine and mine.code and not state.is_active else state.reason
        progress = (last_logged_step(run_dir / "metrics.jsonl") or 0, latest_step(run_dir) or 0, job.steps)
        found.append(
            Status(
                run_dir, state.job_id, state.state, "" if words == "None" else words, state.nodes, *progress, state.code
            )
        )
    return found


def wait_for(run_dirs: Sequence[Path], say: Callable[[str], None], every_s: float = ASK_EVERY_S) -> list[Status]:
    """Wait until the jobs of all runs are over; a change of state is said. A silent Slurm is waited for."""
    last: dict[tuple[Path, str], str] = {}
    while True:
        found = [status for run_dir in run_dirs for status in statuses(run_dir)]
        for status in found:
            if last.get((status.run_dir, status.job_id)) != status.state:
                last[status.run_dir, status.job_id] = status.state
                say(f"job {status.job_id} {status.state}: step {status.step} of {status.steps}, {status.run_dir}")
        if all(status.is_over for status in found):
            return found
        time.sleep(every_s)


def cancel_run(run_dir: Path, now: bool) -> str:
    """End a run's job: after its step and a save, or ``now``; returns what was done, in words.

    It is recorded first, so that nothing requeues the job.

    Raises:
        ConfigError: there is no job, or Slurm refuses. PeerLost: Slurm does not answer.
    """
    job_id = job_of(run_dir)
    if job_id is None:
        raise ConfigError(f"{run_dir} has no job of Slurm's", f"isotrain status {run_dir}")
    write_cancelled(run_dir, job_id)
    states = job_states(job_id)
    if any(state.is_out_of_reach for state in states):
        raise PeerLost(f"Slurm does not answer: {states[0].reason}", "the same command again")
    active = [state for state in states if state.is_active]
    if not active:
        return f"job {job_id} is over already ({states[0].state})"
    try:
        for state in active:
            politely = state.state == "RUNNING" and not now
            cancel(state.job_id, "USR1" if politely else "")
    except SlurmError as error:
        raise ConfigError(f"Slurm refuses: {error}", f"scancel {job_id}") from error
    if any(state.state == "RUNNING" for state in active) and not now:
        return f"job {job_id} stops after its step and saves (at once: isotrain cancel --now {run_dir})"
    return f"job {job_id} is cancelled"


def log_files(run_dir: Path, rank: str | None) -> list[Path]:
    """The logs to show: the jobs' own, oldest first; those of one rank; or, for ``all``, of every rank."""
    if rank is None:
        files = sorted(slurm_folder(run_dir).glob("*.log"), key=lambda file: file.stat().st_mtime)
    else:
        pattern = "rank-*.log" if rank == "all" else f"rank-{rank}.log"
        files = sorted((run_dir / "logs").glob(pattern), key=lambda file: int(file.stem.removeprefix("rank-")))
    return files


def log_lines(
    run_dir: Path, rank: str | None, is_over: Callable[[], bool] | None, ask_every_s: float = ASK_EVERY_S
) -> Iterator[str]:
    """Lines of the logs; those of all ranks are merged and say whose they are.

    Args:
        run_dir: the run folder.
        rank: a rank's number, ``all``, or None for the job's own log.
        is_over: given: go on until it says so, looking for new lines and new files.
    """
    places: dict[Path, int] = {}
    asked = time.monotonic()
    over = is_over is None
    while True:
        for file in log_files(run_dir, rank):
            lines, places[file] = _new_lines(file, places.get(file, 0), whole=not over)
            prefix = f"[{file.stem.removeprefix('rank-')}] " if rank == "all" else ""
            yield from (prefix + line for line in lines)
        if over:
            return
        time.sleep(0.3)
        if is_over is not None and time.monotonic() - asked > ask_every_s:
            over, asked = is_over(), time.monotonic()


def _new_lines(file: Path, place: int, whole: bool) -> tuple[list[str], int]:
    """Lines after ``place``, and the place after them; ``whole``: without a last one that is still being written."""
    with file.open("rb") as stream:
        stream.seek(place)
        text = stream.read()
    end = text.rfind(b"\n") + 1 if whole else len(text)
    return text[:end].decode(errors="replace").splitlines(), place + end
