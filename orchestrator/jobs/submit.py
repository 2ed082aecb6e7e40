"""``isotrain submit``: plan, write the run folder and its batch script, hand it to sbatch once."""

from __future__ import annotations

import dataclasses
import difflib
import re
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.environment import path_with, submitting_environment
from launch.slurm.commands import SlurmError, find_by_comment, job_states, partitions, submit_once
from launch.slurm.script import Header, render_script, words_file
from orchestrator.commands import Planned, Say, check_files, make_folder, run_folder
from orchestrator.config.job import ClusterConfig, JobConfig
from orchestrator.config.loading import compose_job
from orchestrator.config.secrets import read_secrets
from orchestrator.detection.cluster import as_asked, found_cluster, on_cluster, refuse_login_node
from orchestrator.errors import ConfigError, PeerLost
from orchestrator.jobs.nodes import node_range, plan_on
from orchestrator.jobs.record import Submission, forget_submission, read_submission, slurm_folder, write_submission
from orchestrator.locking import locked
from orchestrator.runs import Decision, decide_train, write_run, write_whole

ON_RANKS = ("apptainer", "pyxis")  # prologues that wrap the ranks; the others are for the script itself
SLURMS_PATTERN = re.compile(r"%[%\dAabJjNnstux]")  # sbatch(1), "filename pattern"


@dataclass(frozen=True)
class Prepared:
    """A job as it would be submitted; nothing has been done yet. ``job``: as it was asked."""

    run_dir: Path
    job: JobConfig
    planned: Planned
    decision: Decision
    script: str


@dataclass(frozen=True)
class Submitted:
    """``job_id``: None when the run is finished and nothing was submitted."""

    run_dir: Path
    job_id: str | None
    message: str

    def summary(self) -> dict[str, object]:
        """What ``--json`` prints."""
        script = slurm_folder(self.run_dir) / "train.sbatch"
        said = {"job_id": self.job_id, "run_dir": str(self.run_dir), "message": self.message}
        return {"code": 0, **said, "script": str(script)}


def prepare(overrides: Sequence[str]) -> Prepared:
    """Compose, plan and render; nothing is written.

    Raises:
        ConfigError, SpecError, LaunchError: the job cannot work, or a value cannot stand in an #SBATCH line.
    """
    job = compose_job(overrides)
    run_dir = run_folder(job)
    planned = plan_submission(job)
    return Prepared(run_dir, job, planned, decide_train(run_dir, job), script_of(planned.job.cluster, run_dir))


def plan_submission(job: JobConfig) -> Planned:
    """The plan for the most nodes that a job may get; it works with the fewest, too.

    Its job keeps the range, also where the plan leaves nodes idle: they stand in for those that are lost.

    Raises:
        ConfigError, SpecError: it does not, or its file of secrets cannot be read.
    """
    refuse_login_node(job.cluster)
    fewest, most = node_range(on_cluster(job, found_cluster(job.cluster)).cluster)
    plan_on(job, fewest)
    planned = plan_on(job, most)
    ranged = dataclasses.replace(planned.job.cluster, nodes=most)
    if job.cluster.slurm.secrets:
        read_secrets(Path(job.cluster.slurm.secrets))
    return dataclasses.replace(planned, job=dataclasses.replace(planned.job, cluster=ranged))


def script_of(cluster: ClusterConfig, run_dir: Path) -> str:
    """The batch script for a folder.

    Raises:
        ConfigError: Slurm would lose its log, or a container cannot have a folder. LaunchError: a value cannot stand in
            an #SBATCH line.
    """
    kind, *names = cluster.slurm.prologue or [""]
    bound = [str(run_dir), *names[1:]] if kind in ON_RANKS else []
    if cut := [folder for folder in bound if "," in folder or ":" in folder]:
        raise ConfigError(
            f"{cut[0]}: {kind} cannot bind a folder with a comma or a colon in its name", "run_dir=ANOTHER"
        )
    if "\\" in str(run_dir):
        raise ConfigError(
            f"run_dir={run_dir}: Slurm loses the log of a job in a folder with a backslash", "run_dir=ANOTHER"
        )
    if pattern := SLURMS_PATTERN.search(str(run_dir)):
        raise ConfigError(
            f"run_dir={run_dir}: Slurm puts something else in the place of {pattern[0]}, and does not find the folder",
            "run_dir=ANOTHER",
        )
    return render_script(static_script(), header(cluster, run_dir), run_dir)


def static_script(name: str = "train.sbatch") -> str:
    """The text of a script in ``slurm/``, of the installed package or of the checkout.

    Raises:
        ConfigError: neither is there.
    """
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "slurm", package.parent / "slurm"):
        if (folder / name).is_file():
            return (folder / name).read_text(encoding="utf-8")
    raise ConfigError(f"slurm/{name} is not in {package} or beside it", "pip install --force-reinstall isotrain")


def header(cluster: ClusterConfig, run_dir: Path) -> Header:
    """The ``#SBATCH`` lines of a run. The log lies in the run folder, which is where sbatch is called."""
    slurm, (fewest, most) = cluster.slurm, node_range(cluster)
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", run_dir.name).strip("-.") or "run"
    gpus = slurm.gres or (f"gpu:{cluster.gpus_per_node}" if cluster.device == "cuda" else None)
    options: dict[str, str | None] = {
        "job-name": f"isotrain-{name}"[:60],
        "nodes": f"{fewest}-{most}" if fewest < most else str(most),
        "gres": gpus,
        "exclusive": "" if slurm.exclusive else None,
        "mem": "0" if slurm.exclusive else None,
        "cpus-per-task": None if slurm.exclusive else str(cluster.gpus_per_node),
        "time": slurm.time,
        "account": slurm.account,
        "partition": slurm.partition,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "exclude": slurm.exclude,
        "reservation": slurm.reservation,
        "mail-user": slurm.mail_user,
        "mail-type": slurm.mail_type or ("END,FAIL" if slurm.mail_user else None),
        "array": slurm.array,
        "dependency": slurm.dependency,
        "kill-on-invalid-dep": "yes" if slurm.dependency else None,
        "signal": f"B:USR1@{slurm.signal_s}",
        "requeue" if slurm.requeue else "no-requeue": "",
        "open-mode": "append",
        "output": "slurm/%A_%a.log" if slurm.array else "slurm/%j.log",
    }
    return Header(tuple((key, value) for key, value in options.items() if value is not None), tuple(slurm.extra))


def leaving_out(prepared: Prepared, nodes: Sequence[str]) -> Prepared:
    """The same job, without these nodes beside those that it was to do without.

    Raises:
        LaunchError: a name cannot stand in an #SBATCH line.
    """
    if not nodes:
        return prepared

    def changed(job: JobConfig) -> JobConfig:
        exclude = ",".join([*([job.cluster.slurm.exclude] if job.cluster.slurm.exclude else []), *nodes])
        slurm = dataclasses.replace(job.cluster.slurm, exclude=exclude)
        return dataclasses.replace(job, cluster=dataclasses.replace(job.cluster, slurm=slurm))

    planned = dataclasses.replace(prepared.planned, job=changed(prepared.planned.job))
    script = script_of(planned.job.cluster, prepared.run_dir)
    return dataclasses.replace(prepared, job=changed(prepared.job), planned=planned, script=script)


def submit(
    overrides: Sequence[str],
    say: Say = lambda text: None,
    find_bad: Callable[[Prepared], Sequence[str]] | None = None,
) -> Submitted:
    """Submit a run: a new one, or one that goes on after its newest checkpoint.

    A second call while the job waits or runs is refused; one whose answer was lost is found again, not repeated.

    Args:
        find_bad: looks for nodes that the job shall do without, before anything of it is written.

    Raises:
        ConfigError: the job cannot work, the run has a job already, or Slurm refuses it (in Slurm's words).
        PeerLost: Slurm does not answer.
    """
    prepared = prepare(overrides)
    job, run_dir, decision = prepared.planned.job, prepared.run_dir, prepared.decision
    if decision.kind == "finished":
        return Submitted(run_dir, None, decision.message)
    check_files(job, decision.kind)
    make_folder(run_dir)
    slurm_folder(run_dir).mkdir(exist_ok=True)
    with locked(slurm_folder(run_dir)):  # two of these commands at once submit once; the job itself may start by now
        taken = _earlier_job(run_dir)
        if taken is not None:
            words = f"job {taken} was taken by Slurm at the first try: nothing was submitted again"
            return Submitted(run_dir, taken, words)
        say(decision.message)
        say(prepared.planned.words)
        if find_bad is not None:
            prepared = leaving_out(prepared, find_bad(prepared))
            job = prepared.planned.job
        with locked(run_dir):
            kept = dataclasses.replace(as_asked(job, prepared.job), run_dir=str(run_dir))
            write_run(run_dir, kept, prepared.planned.plan.to_json())
            forget_earlier(run_dir)
            script = write_script(run_dir, job.cluster, prepared.script)
        submission = new_submission()
        write_submission(run_dir, submission)
        job_id = hand_over(run_dir, script, submission, job.cluster, say)
        write_submission(run_dir, dataclasses.replace(submission, job_id=job_id))
        return Submitted(run_dir, job_id, f"job {job_id} is submitted")


def new_submission() -> Submission:
    """One with a mark of its own."""
    return Submission(f"isotrain:{secrets.token_hex(8)}", None, time.time())


def hand_over(run_dir: Path, script: Path, submission: Submission, cluster: ClusterConfig, say: Say) -> str:
    """Give a script to sbatch, once; returns the job id.

    Raises:
        ConfigError: Slurm refuses it, and the submission is forgotten. PeerLost: Slurm does not answer.
    """
    environment = submitting_environment({"PATH": path_with(Path(sys.executable).parent)})
    try:
        return submit_once(script, submission.mark, cwd=run_dir, environment=environment, say=say)
    except SlurmError as error:
        if error.passing:
            words = f"Slurm does not answer ({error}); whether it has taken the job is not known"
            raise PeerLost(words, "the same command again: it looks for the job first") from error
        forget_submission(run_dir, submission)
        raise refused(str(error), cluster) from error


def forget_earlier(run_dir: Path) -> None:
    """Forget what was noted of earlier jobs of a run, so that it does not count for the next one."""
    for name in ("cancelled.json", "starts.json"):
        (slurm_folder(run_dir) / name).unlink(missing_ok=True)


def write_script(run_dir: Path, cluster: ClusterConfig, text: str, name: str = "train.sbatch") -> Path:
    """Write a script and the words of its prologue; returns the script's file."""
    folder, prologue = slurm_folder(run_dir), cluster.slurm.prologue
    folder.mkdir(exist_ok=True)
    (folder / "prologue").write_bytes(words_file([] if prologue[:1] and prologue[0] in ON_RANKS else prologue))
    script = folder / name
    write_whole(script, text, mode=0o600)
    return script


def _earlier_job(run_dir: Path) -> str | None:
    """The job whose id was lost on its way back, if there is one.

    Raises:
        ConfigError: the run's job waits or runs. PeerLost: Slurm does not say whether it does.
    """
    earlier = read_submission(run_dir)
    if earlier is None:
        return None
    if earlier.job_id is None:
        try:
            found = find_by_comment(earlier.mark)
        except SlurmError as error:
            raise PeerLost(f"Slurm does not answer ({error})", "the same command again") from error
        if found is not None:
            write_submission(run_dir, dataclasses.replace(earlier, job_id=found))
        return found
    refuse_second_job(run_dir)
    return None


def refuse_second_job(run_dir: Path) -> None:
    """See that the job of a run, if its id is known, neither waits nor runs.

    Raises:
        ConfigError: it does. PeerLost: Slurm does not say whether it does.
    """
    earlier = read_submission(run_dir)
    if earlier is None or earlier.job_id is None:
        return
    states = job_states(earlier.job_id)
    for state in states:
        if state.is_active:
            raise ConfigError(
                f"{run_dir} is job {state.job_id} already ({state.state})",
                f"isotrain status {run_dir}   or   isotrain cancel {run_dir}   or   run_dir=ANOTHER",
            )
    if states and states[0].is_out_of_reach:
        raise PeerLost(
            f"Slurm does not say whether job {earlier.job_id} runs: {states[0].reason}", "the same command again"
        )


def refused(said: str, cluster: ClusterConfig) -> ConfigError:
    """Slurm's refusal, in its own words, with a hint where there is one to give."""
    slurm, low = cluster.slurm, said.lower()
    hint = "see sinfo, and cluster.slurm.* in docs/launch.md"
    if "invalid partition" in low or "partition" in low:
        there = partitions()
        near = difflib.get_close_matches(slurm.partition or "", there, n=1) or there[:1] or ["NAME"]
        hint = f"cluster.slurm.partition={near[0]}" + (f"   (there are: {', '.join(there)})" if there else "")
    elif "account" in low:
        hint = "cluster.slurm.account=NAME   (yours: sacctmgr show associations user=$USER format=account,qos)"
    elif "qos" in low and "limit" in low:
        hint = "wait until some of your jobs have ended (isotrain status all), or cluster.slurm.qos=ANOTHER"
    elif "qos" in low:
        hint = "cluster.slurm.qos=NAME   (yours: sacctmgr show associations user=$USER format=account,qos)"
    elif "time limit" in low:
        hint = f"cluster.slurm.time='01:00:00'   (now {slurm.time})"
    elif "node configuration" in low or "gres" in low:
        hint = "cluster.nodes=N or cluster.gpus_per_node=N, as the partition has (sinfo -o '%P %D %G')"
    return ConfigError(f"Slurm refuses the job: {said}", hint)
