"""``isotrain status``, ``wait``, ``cancel``, ``logs``: what Slurm says of a run's job, and what its folder says."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.slurm.commands import FORGOTTEN, UNKNOWN, JobState, SlurmError, cancel
from orchestrator.config.building import read_job
from orchestrator.errors import ConfigError, ExitCode, PeerLost
from orchestrator.jobs.asking import job_of, states_of
from orchestrator.jobs.record import (
    is_cancelled,
    read_ended,
    read_submission,
    runs_in,
    slurm_folder,
    submitted_runs,
    write_cancelled,
)
from orchestrator.runs import latest_step
from orchestrator.supervise import last_logged_step
from orchestrator.sweeps.book import is_sweep

ASK_EVERY_S = 2.0
# What the end of a job means that Slurm gives no code of; after any other one the same command goes on.
ENDS = {"CANCELLED": ExitCode.GAVE_UP, "OUT_OF_MEMORY": ExitCode.RESOURCES}


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
        return _is_over(JobState(self.job_id, self.state, self.reason))

    @property
    def exit_code(self) -> int:
        """What the job's end means, as an exit code: 0 only when it is completed."""
        if self.state == "COMPLETED":
            return 0
        return self.code or int(ENDS.get(self.state, ExitCode.PEER_LOST))


def _is_over(state: JobState) -> bool:
    return not state.is_active and not state.is_out_of_reach


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
            raise ConfigError(f"{folder} has no job of Slurm's", _instead(folder))
    return folders


def _instead(folder: Path) -> str:
    """What tells of a folder that was never submitted."""
    if is_sweep(folder):
        return f"isotrain sweep {folder}"
    trained_here = (folder / "job.yaml").is_file()
    return f"isotrain report {folder}" if trained_here else f"isotrain submit ... run_dir={folder}"


def statuses(run_dir: Path) -> list[Status]:
    """A run's job, or every task of its array; of a folder of runs, each of them.

    Where Slurm has forgotten the job, what the run itself has written at its end counts; where Slurm does not answer,
    the state is UNKNOWN.
    """
    return [_status(run, state) for run, states in states_of(runs_in(run_dir)).items() for state in states]


def _status(run_dir: Path, state: JobState) -> Status:
    ended = read_ended(run_dir)
    mine = ended if ended and ended.job_id == state.job_id and not ended.requeued else None
    if state.state == UNKNOWN and state.reason == FORGOTTEN:
        if mine:
            known = "COMPLETED" if mine.code == 0 else "FAILED"
            state = dataclasses.replace(state, state=known, reason="", code=mine.code)
        elif is_cancelled(run_dir, state.job_id):  # a task that waited leaves nothing behind
            state = dataclasses.replace(state, state="CANCELLED", reason="")
    words = mine.message if mine and mine.code and not state.is_active else state.reason
    steps = read_job(run_dir).steps
    progress = (last_logged_step(run_dir / "metrics.jsonl") or 0, latest_step(run_dir) or 0, steps)
    return Status(
        run_dir, state.job_id, state.state, "" if words == "None" else words, state.nodes, *progress, state.code
    )


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
    """End a run's job, or those of a folder of runs: after a step and a save, or ``now``; returns what was done.

    It is recorded first, so that nothing requeues the job.

    Raises:
        ConfigError: there is no job, or Slurm refuses. PeerLost: Slurm does not answer.
    """
    runs = runs_in(run_dir)
    jobs = {run: job_id for run in runs if (job_id := job_of(run)) is not None}
    if not jobs:
        raise ConfigError(f"{run_dir} has no job of Slurm's", f"isotrain status {run_dir}")
    for run, job_id in jobs.items():
        write_cancelled(run, job_id)
    states = [state for found in states_of(list(jobs)).values() for state in found]
    silent = next((state for state in states if state.is_out_of_reach), None)
    if silent is not None:
        raise PeerLost(f"Slurm does not answer: {silent.reason}", "the same command again")
    active = [state for state in states if state.is_active]
    alone = runs == [run_dir]
    name = f"job {jobs[run_dir]} is" if alone else f"{len(active)} jobs of {run_dir} are"
    if not active:
        return f"{name} over already ({states[0].state})" if alone else f"the jobs of {run_dir} are over already"
    running = [state for state in active if state.state == "RUNNING"]
    try:
        for state in active:
            cancel(state.job_id, "USR1" if state in running and not now else "")
    except SlurmError as error:
        raise ConfigError(f"Slurm refuses: {error}", f"scancel {active[0].job_id}") from error
    if running and not now:
        which = "it stops" if alone else f"{len(running)} of them stop"
        return f"{name} cancelled: {which} after a step and a save (at once: isotrain cancel --now {run_dir})"
    return f"{name} cancelled"


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
