"""Slurm's own commands, with a time limit, and errors that say whether asking again helps."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# What Slurm says while it is busy, restarting or out of reach (src/common/slurm_errno.c).
PASSING = re.compile(
    r"socket timed out|unable to contact slurm controller|connection (refused|timed out|reset)|no route to host"
    r"|resource temporarily unavailable|temporarily unable to accept job|in standby mode|zero bytes were transmitted"
    r"|unexpected message received|message receive failure|communication connection failure"
    r"|unable to establish control(ler)? (machine|address)|did not answer",
    re.IGNORECASE,
)
UNKNOWN_JOB = re.compile(r"invalid job id", re.IGNORECASE)
ACTIVE = frozenset(
    [
        "PENDING",
        "CONFIGURING",
        "RUNNING",
        "COMPLETING",
        "SUSPENDED",
        "REQUEUED",
        "REQUEUE_HOLD",
        "REQUEUE_FED",
        "RESIZING",
        "STAGE_OUT",
        "SIGNALING",
        "SPECIAL_EXIT",
        "STOPPED",
        "PREEMPTED_REQUEUED",
    ]
)
UNKNOWN = "UNKNOWN"
FORGOTTEN = "Slurm has forgotten it"
ANSWER_S = 60.0
LATE_S = 10.0  # slurm.conf's MessageTimeout: a controller that was too slow to answer may still take the job


class SlurmError(RuntimeError):
    """A command of Slurm's failed; the message is Slurm's own. ``passing``: it may work later."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.passing = bool(PASSING.search(message))


@dataclass(frozen=True)
class JobState:
    """One job (or one task of an array) as Slurm sees it. ``code``: None where Slurm does not say."""

    job_id: str
    state: str
    reason: str = ""
    nodes: str = ""
    code: int | None = None

    @property
    def is_active(self) -> bool:
        """Whether it waits, runs or ends just now."""
        return self.state in ACTIVE

    @property
    def is_out_of_reach(self) -> bool:
        """Whether Slurm gave no answer; a job that Slurm has forgotten is not out of reach, it has ended."""
        return self.state == UNKNOWN and self.reason != FORGOTTEN


def ask(argv: Sequence[str], *, cwd: Path | None = None, environment: Mapping[str, str] | None = None) -> str:
    """Run a command of Slurm's; return its standard output.

    Raises:
        SlurmError: it is not there, failed, or gave no answer in a minute.
    """
    try:
        done = subprocess.run(
            argv, cwd=cwd, env=environment, capture_output=True, text=True, errors="replace", timeout=ANSWER_S
        )
    except FileNotFoundError as error:
        raise SlurmError(f"{argv[0]} is not on the PATH: this is no Slurm machine") from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"{argv[0]} did not answer in {ANSWER_S:.0f} s") from error
    if done.returncode != 0:
        said = done.stderr.strip() or done.stdout.strip() or f"{argv[0]} ended with code {done.returncode}"
        raise SlurmError(re.sub(r"^\w+: (error: )?", "", said))
    return done.stdout


def ask_again(argv: Sequence[str], patience_s: float = 60.0) -> str:
    """:func:`ask` from inside of a job: while Slurm is busy or restarting, once more, for about ``patience_s``.

    Raises:
        SlurmError: as :func:`ask`.
    """
    deadline, pause_s = time.monotonic() + patience_s, 1.0
    while True:
        try:
            return ask(argv)
        except SlurmError as error:
            if not error.passing or time.monotonic() + pause_s > deadline:
                raise
        time.sleep(pause_s)
        pause_s *= 2


def submit_once(
    script: Path,
    mark: str,
    *,
    cwd: Path,
    environment: Mapping[str, str],
    say: Callable[[str], None],
    patience_s: float = 180.0,
) -> str:
    """Submit a job, again where that helps, and never twice: the job is looked for by its comment before each retry,
    and after it, since a slow controller may have taken the first one only then; the later one is cancelled.

    Args:
        script: the batch script.
        mark: the comment, of this submission alone.
        cwd, environment: sbatch's.
        say: tells the user why it takes longer.
        patience_s: how long to go on.
    Returns:
        The job id.
    Raises:
        SlurmError: Slurm refuses, or ``patience_s`` have passed (``passing`` then: it may have taken the job).
    """
    argv = ["sbatch", "--parsable", "--export=ALL", f"--comment={mark}", str(script)]
    deadline, pause_s = time.monotonic() + patience_s, 1.0
    must_look = False
    while True:
        try:
            if must_look and (taken := _only_one(mark, say)):
                return taken
            job_id = ask(argv, cwd=cwd, environment=environment).strip().partition(";")[0]
            return (must_look and _only_one(mark, say)) or job_id
        except SlurmError as error:
            if not error.passing or time.monotonic() + pause_s > deadline:
                raise
            if "timed out" in str(error).lower():
                pause_s = max(LATE_S, pause_s)
            say(f"Slurm: {error}; asking again in {pause_s:.0f} s")
        must_look = True
        time.sleep(pause_s)
        pause_s = min(30.0, 2 * pause_s)


def _only_one(mark: str, say: Callable[[str], None]) -> str | None:
    """The first job with this comment; those after it are cancelled."""
    jobs = _jobs_by_comment(mark)
    for job_id in jobs[1:]:
        cancel(job_id)
        say(f"Slurm had taken job {jobs[0]} after all: job {job_id} is cancelled")
    return jobs[0] if jobs else None


def find_by_comment(mark: str) -> str | None:
    """The id of our job with this comment, also when it has ended a moment ago; None when there is none.

    Raises:
        SlurmError: Slurm does not answer.
    """
    return next(iter(_jobs_by_comment(mark)), None)


def _jobs_by_comment(mark: str) -> list[str]:
    """Ids, the first that was given first; the tasks of an array have one."""
    listed = ask(["squeue", "--noheader", f"--user={os.getuid()}", "--states=all", "--format=%F %k"])
    rows = [line.strip().partition(" ") for line in listed.splitlines()]
    return sorted({job_id for job_id, _, comment in rows if comment.strip() == mark}, key=int)


def job_states(job_id: str) -> list[JobState]:
    """The job, or each task of an array that Slurm lists; UNKNOWN when Slurm does not answer or has forgotten it."""
    try:
        shown = ask(["scontrol", "--oneliner", "show", "job", job_id])
    except SlurmError as error:
        if UNKNOWN_JOB.search(str(error)):
            return _accounted(job_id) or [JobState(job_id, UNKNOWN, FORGOTTEN)]
        return [JobState(job_id, UNKNOWN, str(error).splitlines()[0])]
    states = [_state(fields_of(line)) for line in shown.splitlines() if line.strip()]
    return sorted(states, key=lambda state: (len(state.job_id), state.job_id))


def fields_of(line: str) -> dict[str, str]:
    """``Key=value`` pairs of scontrol's one line. The first of a name counts: what users choose (paths) comes last."""
    fields: dict[str, str] = {}
    for word in line.split():
        key, _, value = word.partition("=")
        fields.setdefault(key, value)
    return fields


def _state(fields: Mapping[str, str]) -> JobState:
    job_id = fields["JobId"]
    if "ArrayTaskId" in fields:
        job_id = f"{fields.get('ArrayJobId', job_id)}_{fields['ArrayTaskId']}"
    state = fields.get("JobState", UNKNOWN)
    code = _code_of(state, fields.get("ExitCode", ""))
    nodes = fields.get("NodeList", "")
    return JobState(job_id, state, fields.get("Reason", ""), "" if nodes == "(null)" else nodes, code)


def _code_of(state: str, text: str) -> int | None:
    """``CODE:SIGNAL`` as the code a shell would see; None where that says nothing: the job goes on, Slurm itself has
    ended it (``0:0``), or there is no such signal (125 stands for a lack of memory).

    Example:
        >>> _code_of("FAILED", "85:0"), _code_of("CANCELLED", "0:15"), _code_of("COMPLETED", "0:0")
        (85, 143, 0)
        >>> _code_of("RUNNING", "0:0"), _code_of("TIMEOUT", "0:0"), _code_of("OUT_OF_MEMORY", "0:125")
        (None, None, None)
    """
    code, _, number = text.partition(":")
    if state in ACTIVE or not (code.isdigit() and number.isdigit()):
        return None
    if int(code) or state == "COMPLETED":
        return int(code)
    return 128 + int(number) if int(number) in signal.valid_signals() else None


ACCOUNTED = ("JobID", "State", "ExitCode", "NodeList", "Reason")


def _accounted(job_id: str) -> list[JobState]:
    """What sacct knows of a job; nothing where there is no accounting."""
    layout = ["--allocations", "--noheader", "--parsable2", f"--format={','.join(ACCOUNTED)}"]
    try:
        listed = ask(["sacct", *layout, f"--jobs={job_id}"])
    except SlurmError:
        return []
    rows = [line.split("|") for line in listed.splitlines() if line.count("|") == len(ACCOUNTED) - 1]
    return [_accounted_state(*row) for row in rows]


def _accounted_state(job_id: str, said: str, code: str, nodes: str, reason: str) -> JobState:
    """A row of sacct's; who has cancelled a job stands in its state.

    Example:
        >>> _accounted_state("7", "CANCELLED by 1000", "0:0", "None assigned", "None")
        JobState(job_id='7', state='CANCELLED', reason='by user 1000', nodes='', code=None)
    """
    state, _, who = said.partition(" by ")
    why = f"by user {who}" if who else "" if reason == "None" else reason
    return JobState(job_id, state, why, "" if nodes == "None assigned" else nodes, _code_of(state, code))


def was_preempted(job_id: str) -> bool:
    """Whether Slurm is taking a running job's nodes for another one."""
    try:
        fields = fields_of(ask_again(["scontrol", "--oneliner", "show", "job", job_id]))
    except SlurmError:
        return False
    return fields.get("PreemptTime", "None") != "None" and fields.get("JobState") in ("RUNNING", "PREEMPTED")


def node_address(node: str) -> str:
    """The address that Slurm itself uses for a node.

    Raises:
        SlurmError: Slurm does not answer, or does not know the node.
    """
    shown = ask_again(["scontrol", "--oneliner", "show", "node", node])
    return fields_of(shown).get("NodeAddr", node)


def host_names(node_list: str) -> list[str]:
    """``node[1-3]`` as names, in Slurm's order, which is that of ranks.

    Raises:
        SlurmError: it is no node list.
    """
    return ask(["scontrol", "show", "hostnames", node_list]).split()


def requeue(job_id: str) -> None:
    """Put a running job back into the queue.

    Raises:
        SlurmError: Slurm refuses (as for a job submitted with ``--no-requeue``), or does not answer.
    """
    ask_again(["scontrol", "requeue", job_id])


def cancel(job_id: str, number: str = "") -> None:
    """End a job; with ``number`` (such as USR1) send that signal to its batch script instead.

    Raises:
        SlurmError: Slurm refuses or does not answer.
    """
    ask(["scancel", "--batch", f"--signal={number}", job_id] if number else ["scancel", job_id])


def end_steps(job_id: str) -> list[str]:
    """Kill the steps of a job that lost their srun, but not its batch script; returns those that were there.

    Raises:
        SlurmError: Slurm does not answer.
    """
    listed = ask(["squeue", "--noheader", "--steps", f"--jobs={job_id}", "--format=%i"]).split()
    steps = [step for step in listed if step.rpartition(".")[2].isdigit()]
    if steps:
        ask(["scancel", "--signal=KILL", *steps])
    return steps


def partitions() -> list[str]:
    """The names of the partitions, without the mark of the default one; none when Slurm does not answer."""
    try:
        return [name.rstrip("*") for name in ask(["sinfo", "--noheader", "--format=%P"]).split()]
    except SlurmError:
        return []
