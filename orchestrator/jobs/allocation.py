"""What the batch script runs: plans for the nodes there are, runs the ranks, starts them again if that helps."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launch.environment import (
    MEETING_HOST_VARIABLE,
    MEETING_VARIABLE,
    TERMINAL_VARIABLE,
    rank_variables,
    slurm_variables,
    usable_cores,
)
from launch.exits import INTERRUPTED, PEER_LOST
from launch.slurm.allocation import Allocation, read_allocation
from launch.slurm.commands import SlurmError, host_names, node_address, requeue, was_preempted
from launch.slurm.step import Signals, StepRequest, StepResult, run_step
from launch.stop import WARNINGS
from orchestrator.commands import Planned, Say, check_files, ended, make_folder, run_folder
from orchestrator.config.building import read_job
from orchestrator.config.job import JobConfig, SlurmConfig
from orchestrator.config.secrets import read_secrets
from orchestrator.detection.cluster import as_asked
from orchestrator.errors import ConfigError, ExitCode
from orchestrator.jobs.by_hand import by_hand
from orchestrator.jobs.nodes import node_range, plan_on, spare_nodes
from orchestrator.jobs.record import (
    Ended,
    Submission,
    is_cancelled,
    lost_start,
    note_start,
    read_tasks,
    slurm_folder,
    write_ended,
    write_submission,
)
from orchestrator.jobs.suspects import note_end, note_lost_nodes, suspects, without
from orchestrator.locking import locked
from orchestrator.pages.run_page import report_end
from orchestrator.recovery import patience, progress, run_ranks
from orchestrator.runs import decide_train, write_run
from parallel.specs import SpecError

STARTS_WITHOUT_PROGRESS = 3


@dataclass(frozen=True)
class Verdict:
    """How an allocation ends: the code for Slurm, and whether the job goes back into the queue."""

    code: int
    cause: str
    message: str
    requeue: bool = False


def run_allocation(run_dir: Path | None, overrides: Sequence[str], say: Say) -> int:
    """Train in this allocation of Slurm's; returns the exit code of the job.

    Args:
        run_dir: a run folder that ``isotrain submit`` has written, or a sweep's, of whose points this task of an array
            is one; None: compose ``overrides`` here (sbatch by hand).
        overrides: what was typed after the script's name.
        say: writes a line into the job's log.
    Raises:
        ConfigError: the job cannot work on these nodes, or the folder holds another run.
    """
    signals = Signals()  # at once: a signal while we plan must not be lost, nor end us
    allocation = read_allocation(slurm_variables())
    run_dir = run_of_task(run_dir, allocation) if run_dir else None
    job = read_job(run_dir) if run_dir else by_hand(overrides, allocation)
    run_dir = run_dir or run_folder(job)
    decision = decide_train(run_dir, job)
    say(f"job {allocation.job_id} on {allocation.node_list}: {decision.message}")
    if decision.kind == "finished":
        return int(ExitCode.DONE)
    check_files(job, decision.kind)
    asked = dataclasses.replace(job, run_dir=str(run_dir))
    planned = plan_on(asked, allocation.nodes)  # what cannot work is said before there is a folder
    make_folder(run_dir)
    with locked(run_dir):
        if overrides:
            write_submission(run_dir, Submission(f"isotrain:by-hand-{allocation.job_id}", allocation.job_id))
        verdict = _train_on_what_is_good(run_dir, asked, planned, allocation, decision.step, signals, say)
        say(verdict.message)
        _write_ended(run_dir, allocation, verdict)
        report_end(run_dir)
    return _leave(run_dir, verdict, allocation, say)


def run_of_task(folder: Path, allocation: Allocation) -> Path:
    """The run folder that this job is for; in a folder of several, the one of its task, which finds its log there, too.

    Raises:
        ConfigError: no run has this number.
    """
    runs = read_tasks(folder)
    if not runs:
        return folder
    if allocation.task not in runs:
        raise ConfigError(
            f"job {allocation.job_id} is no task of {folder}: it has {len(runs)}, numbered {min(runs)} to {max(runs)}",
            f"isotrain sweep {folder}",
        )
    run, name = runs[allocation.task], f"{allocation.job_id}.log"
    slurm_folder(run).mkdir(parents=True, exist_ok=True)
    if not (slurm_folder(run) / name).is_symlink():
        (slurm_folder(run) / name).symlink_to(Path("..", "..", "slurm", name))
    return run


def _train_on_what_is_good(
    run_dir: Path, asked: JobConfig, whole: Planned, allocation: Allocation, step: int, signals: Signals, say: Say
) -> Verdict:
    """Train on the nodes there are (``whole``: planned for all), without those that starts are lost to repeatedly."""
    hosts = host_names(allocation.node_list)
    for node in note_lost_nodes(run_dir, lost_start(run_dir), hosts):
        say(f"{node} was lost, and the start before this one with it")
    starts = note_start(run_dir, allocation.job_id, step, hosts)
    verdict: Verdict | None = None
    while verdict is None:
        bad = suspects(run_dir, asked.recovery.node_faults)
        planned, nodes = _plan(asked, whole, hosts, bad)
        if left := [node for node in hosts if node not in nodes]:
            say(f"{', '.join(left)} left out: starts were lost to it {asked.recovery.node_faults} times")
        if words := spare_nodes(planned, len(nodes)):
            say(words)
        write_run(run_dir, as_asked(planned.job, asked), planned.plan.to_json())
        say(planned.words)
        here = _Here(run_dir, planned.job, allocation, tuple(nodes), node_range(asked.cluster)[0], frozenset(bad))
        verdict = _train(here, signals, say, starts)
    return verdict


def _plan(asked: JobConfig, whole: Planned, hosts: list[str], bad: set[str]) -> tuple[Planned, list[str]]:
    """The plan without bad nodes, and the nodes it may use; with them where there is no other."""
    nodes = without(hosts, bad, node_range(asked.cluster)[0])
    if nodes != hosts:
        with suppress(ConfigError, SpecError):
            return plan_on(asked, len(nodes)), nodes
    return whole, hosts


@dataclass(frozen=True)
class _Here:
    """What is trained where. ``nodes``: that may be used; ``fewest``: that a plan may have; ``bad``: known as such."""

    run_dir: Path
    job: JobConfig
    allocation: Allocation
    nodes: tuple[str, ...]
    fewest: int
    bad: frozenset[str]

    def has_new_suspect(self) -> bool:
        """Whether there is a node now that should be left out, and can be."""
        found = suspects(self.run_dir, self.job.recovery.node_faults) - self.bad
        return bool(self.job.recovery.restarts) and len(without(self.nodes, found, self.fewest)) < len(self.nodes)


def _train(here: _Here, signals: Signals, say: Say, starts: Sequence[int]) -> Verdict | None:
    """Train, and again after an end that another try may not meet, until that makes no progress.

    Returns:
        None where a node should be left out from now on.
    """

    def start(attempt: int) -> StepResult:
        end = run_step(_request(here, attempt), signals, lambda: progress(here.run_dir), say)
        note_end(here.run_dir, here.allocation.job_id, end)
        return end

    result, given_up = run_ranks(
        start,
        here.run_dir,
        here.job.recovery.restarts,
        say,
        lambda end: bool(signals.heard) or here.has_new_suspect(),
    )
    if result.cause is not None and not signals.heard and here.has_new_suspect():
        say(result.cause.message)
        return None
    if given_up and result.cause is not None:
        return Verdict(int(ExitCode.GAVE_UP), result.cause.cause, given_up)
    return _verdict(here.run_dir, here.job, here.allocation, signals, result, starts)


def _request(here: _Here, attempt: int) -> StepRequest:
    run_dir, job, allocation = here.run_dir, here.job, here.allocation
    slurm, per_node = job.cluster.slurm, job.cluster.gpus_per_node
    hosts = here.nodes[: job.cluster.nodes]
    meeting = slurm_folder(run_dir) / f"meeting-{allocation.job_id}-{allocation.restarts}-{len(hosts)}-{attempt}.json"
    for earlier in slurm_folder(run_dir).glob("meeting-*.json"):
        earlier.unlink(missing_ok=True)
    meeting.parent.mkdir(exist_ok=True)
    environment = rank_variables(per_node, min(usable_cores(), allocation.cpus_per_node)) | {
        TERMINAL_VARIABLE: "2",
        MEETING_VARIABLE: str(meeting),
        MEETING_HOST_VARIABLE: node_address(hosts[0]),
    }
    if slurm.secrets:
        environment |= read_secrets(Path(slurm.secrets))
    return StepRequest(
        allocation=allocation,
        hosts=hosts,
        ranks_per_node=per_node,
        program=rank_program(run_dir, slurm, job.cluster.device),
        environment=environment,
        run_dir=run_dir,
        patience=patience(job.recovery),
        device=job.cluster.device,
    )


def rank_program(
    run_dir: Path, slurm: SlurmConfig, device: str, words: tuple[str, ...] | None = None
) -> tuple[str, ...]:
    """What each srun task runs: this Python's isotrain, or the one of a container.

    Args:
        words: what isotrain is told; None: to be a rank.

    Example:
        >>> rank_program(Path("/r"), SlurmConfig(prologue=["apptainer", "image.sif", "/data"]), "cuda")
        ('apptainer', 'exec', '--bind=/r,/data', '--nv', 'image.sif', 'isotrain', 'worker', '/r')
        >>> rank_program(Path("/r"), SlurmConfig(prologue=["pyxis", "image.sqsh"]), "cuda")
        ('--container-image=image.sqsh', '--container-mounts=/r:/r', 'isotrain', 'worker', '/r')
    """
    kind, *names = slurm.prologue or [""]
    folders = [str(run_dir), *names[1:]]
    words = words or ("worker", str(run_dir))
    inside = ("isotrain", *words)
    if kind == "apptainer":
        graphics = ("--nv",) if device == "cuda" else ()
        return ("apptainer", "exec", f"--bind={','.join(folders)}", *graphics, names[0], *inside)
    if kind == "pyxis":
        mounts = ",".join(f"{folder}:{folder}" for folder in folders)
        return (f"--container-image={names[0]}", f"--container-mounts={mounts}", *inside)
    return (sys.executable, "-m", "orchestrator", *words)


def _verdict(
    run_dir: Path, job: JobConfig, allocation: Allocation, signals: Signals, result: StepResult, starts: Sequence[int]
) -> Verdict:
    """What follows from how the ranks ended and from who asked them to."""
    finished = ended(run_dir, job.steps, result.code, result.cause)
    cause = result.cause.cause if result.cause else "done"
    plain = Verdict(result.code, cause, finished.message)
    if result.code not in (INTERRUPTED, PEER_LOST):
        return plain
    if is_cancelled(run_dir, allocation.job_id):
        return dataclasses.replace(plain, message=f"{plain.message}; cancelled, so it is not requeued")
    warned = not set(WARNINGS).isdisjoint(signals.heard) or was_preempted(allocation.job_id)
    if not (warned and job.cluster.slurm.requeue):
        return plain
    if len(starts) >= STARTS_WITHOUT_PROGRESS and min(starts[-STARTS_WITHOUT_PROGRESS:]) >= finished.step:
        words = f"{len(starts)} allocations brought no checkpoint after step {finished.step}: not requeued"
        return Verdict(int(ExitCode.GAVE_UP), cause, words)
    return dataclasses.replace(plain, requeue=True, message=f"{plain.message}; it goes on when Slurm gives nodes again")


def _leave(run_dir: Path, verdict: Verdict, allocation: Allocation, say: Say) -> int:
    if verdict.requeue:
        try:
            requeue(allocation.job_id)  # it may end this process at once, so all is written by now
        except SlurmError as error:
            say(f"Slurm does not requeue job {allocation.job_id}: {error}")
            _write_ended(run_dir, allocation, dataclasses.replace(verdict, requeue=False))
    return verdict.code


def _write_ended(run_dir: Path, allocation: Allocation, verdict: Verdict) -> None:
    write_ended(
        run_dir, Ended(allocation.job_id, verdict.code, verdict.cause, verdict.message, requeued=verdict.requeue)
    )
