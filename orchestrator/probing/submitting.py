"""``isotrain submit --probe``: a probe is rendered, handed to Slurm, waited for, and judged."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from launch.environment import path_with, submitting_environment
from launch.slurm.commands import JobState, SlurmError, cancel, find_by_comment, host_names, job_states, submit_once
from launch.slurm.script import Header, render_script
from orchestrator.commands import Say
from orchestrator.config.job import JobConfig
from orchestrator.detection.cluster import found_cluster
from orchestrator.errors import ConfigError, GaveUp, PeerLost, ResourceError
from orchestrator.jobs.nodes import node_range, plan_on
from orchestrator.jobs.record import Submission, slurm_folder
from orchestrator.jobs.submit import Prepared, header, new_submission, refused, static_script, write_script
from orchestrator.planning.estimate import cluster_device
from orchestrator.planning.links import two_nodes_rate
from orchestrator.probing.allocation import GRACE_S, PAIR_ROUNDS
from orchestrator.probing.judging import Judgement, judge
from orchestrator.probing.report import (
    Asked,
    Found,
    found_file,
    read_found,
    read_reports,
    reports_folder,
    write_asked,
)
from orchestrator.runs import write_whole
from parallel.specs import SpecError

PATIENCE_S = 120.0
ASK_EVERY_S = 2.0
SEEN_AFTER_S = 60.0  # a network folder may show a new file that late
# Options of the job that a probe has none of, or others.
NOT_THE_PROBES = frozenset(
    ("mail-user", "mail-type", "array", "dependency", "kill-on-invalid-dep", "signal", "requeue", "no-requeue")
)


@dataclass(frozen=True)
class Options:
    """``nodes``: how many are probed; None: as many as the job asks for. ``patience_s``: for an answer of a node."""

    nodes: int | None = None
    patience_s: float = PATIENCE_S


class TooFewNodes(ResourceError):
    """Not enough nodes are known to be good (71); the judgement says why."""

    def __init__(self, message: str, hint: str, judgement: Judgement) -> None:
        super().__init__(message, hint)
        self.judgement = judgement


def probe_script(prepared: Prepared, options: Options) -> str:
    """The batch script of a probe: ``slurm/probe.sbatch`` with the job's own ``#SBATCH`` lines as far as they fit.

    Raises:
        ConfigError: fewer nodes would be probed than the job needs.
    """
    cluster, run_dir = prepared.planned.job.cluster, prepared.run_dir
    fewest, _ = node_range(cluster)
    if options.nodes is not None and options.nodes < fewest:
        raise ConfigError(
            f"--probe-nodes {options.nodes}: the job needs {fewest} good nodes", f"--probe-nodes {fewest + 1}"
        )
    limit_min = math.ceil(((PAIR_ROUNDS + 2) * (options.patience_s + GRACE_S) + 60) / 60)
    trained = header(cluster, run_dir)
    changed = {
        "job-name": f"isotrain-probe-{dict(trained.options)['job-name'].removeprefix('isotrain-')}"[:60],
        "nodes": str(options.nodes) if options.nodes is not None else dict(trained.options)["nodes"],
        "time": f"{limit_min // 60:02}:{limit_min % 60:02}:00",
        "output": "slurm/probe-%j.log",
    }
    kept = {name: value for name, value in trained.options if name not in NOT_THE_PROBES}
    lines = kept | changed | {"no-requeue": "", "no-kill": ""}
    return render_script(static_script("probe.sbatch"), Header(tuple(lines.items()), trained.extra), run_dir)


def asked_of(job: JobConfig, token: str, patience_s: float) -> Asked:
    """What the nodes are probed for, by the job and what its plan assumes of the links."""
    cluster = job.cluster
    is_gpus = cluster.device == "cuda"
    rate = two_nodes_rate(cluster_device(found_cluster(cluster)), cluster.gpus_per_node) if is_gpus else 0.0
    return Asked(
        token=token,
        device=cluster.device,
        gpus_per_node=cluster.gpus_per_node,
        memory_gib=cluster.memory_gib if is_gpus else 0.0,
        patience_s=patience_s,
        assumed_rate=rate,
        prologue=tuple(cluster.slurm.prologue),
    )


def probe(prepared: Prepared, options: Options, say: Say, every_s: float = ASK_EVERY_S) -> Judgement:
    """Probe nodes like those that the job asks for, and judge them; the job itself is not touched.

    Raises:
        ConfigError: Slurm refuses the probe. PeerLost: it does not answer. GaveUp: somebody cancelled the probe.
        ResourceError: it ended before any node could answer.
        KeyboardInterrupt: the probe is cancelled then.
    """
    run_dir, cluster = prepared.run_dir, prepared.planned.job.cluster
    text = probe_script(prepared, options)
    _cancel_earlier(run_dir, say)
    shutil.rmtree(reports_folder(run_dir), ignore_errors=True)
    reports_folder(run_dir).mkdir()
    found_file(run_dir).unlink(missing_ok=True)
    submission = new_submission()
    asked = asked_of(prepared.planned.job, submission.mark, options.patience_s)
    write_asked(run_dir, asked)
    script = write_script(run_dir, cluster, text, "probe.sbatch")
    _note(run_dir, submission)
    try:
        submission = dataclasses.replace(submission, job_id=_hand_over(script, submission, prepared, say))
        _note(run_dir, submission)
        found = _waited(prepared, submission, say, every_s)
    except KeyboardInterrupt:
        _cancel(submission, say)
        raise
    return judge(found, asked)


def refuse_too_few(prepared: Prepared, judgement: Judgement) -> None:
    """Nothing is submitted where not enough nodes are known to be good.

    Raises:
        TooFewNodes: says how many there are, and what would work.
    """
    good, probed = len(judgement.good), len(judgement.verdicts)
    fewest, most = node_range(prepared.planned.job.cluster)
    if good >= fewest:
        return
    hint = f"--probe-nodes {probed + fewest - good}"
    usable = _usable(prepared, good)
    if usable:
        hint += f"   or   cluster.nodes={usable}-{most}"
    raise TooFewNodes(
        f"{good} of {probed} probed nodes are good, and the job needs {fewest}: nothing is submitted", hint, judgement
    )


def _usable(prepared: Prepared, good: int) -> int:
    """On how many of the good nodes the job would run; 0 where on none."""
    job = prepared.job
    open_job = dataclasses.replace(job, cluster=dataclasses.replace(job.cluster, fewest_nodes=1))
    with suppress(ConfigError, SpecError):
        return plan_on(open_job, good).job.cluster.nodes if good else 0
    return 0


def _hand_over(script: Path, submission: Submission, prepared: Prepared, say: Say) -> str:
    environment = submitting_environment({"PATH": path_with(Path(sys.executable).parent)})
    try:
        return submit_once(script, submission.mark, cwd=prepared.run_dir, environment=environment, say=say)
    except SlurmError as error:
        if error.passing:
            raise PeerLost(f"Slurm does not answer ({error})", "the same command again") from error
        raise refused(str(error), prepared.planned.job.cluster) from error


def _waited(prepared: Prepared, submission: Submission, say: Say, every_s: float) -> Found:
    """Wait until the probe is over; a change is said."""
    assert submission.job_id is not None
    before = ""
    while True:
        state = job_states(submission.job_id)[0]
        answers = len(read_reports(prepared.run_dir, submission.mark))
        words = _progress(state, answers)
        if words != before:
            say(words)
            before = words
        if not state.is_active and not state.is_out_of_reach:
            return _found(prepared, submission, state)
        time.sleep(every_s)


def _progress(state: JobState, answers: int) -> str:
    reason = f" ({state.reason})" if state.reason not in ("", "None") and state.state != "RUNNING" else ""
    nodes = f" on {state.nodes}" if state.nodes else ""
    answered = f", {answers} answers" if state.state == "RUNNING" else ""
    return f"probe: job {state.job_id} {state.state}{reason}{nodes}{answered}"


def _found(prepared: Prepared, submission: Submission, state: JobState) -> Found:
    """What a probe that has ended leaves behind: all, or what single nodes have written by then."""
    run_dir = prepared.run_dir
    deadline = time.monotonic() + (SEEN_AFTER_S if state.state == "COMPLETED" else 0.0)
    while (found := read_found(run_dir, submission.mark)) is None and time.monotonic() < deadline:
        time.sleep(ASK_EVERY_S)
    if found is not None:
        return found
    if state.state == "CANCELLED":
        raise GaveUp(f"the probe, job {state.job_id}, was cancelled: nothing is submitted", "the same command again")
    reports = read_reports(run_dir, submission.mark)
    if not reports:
        raise _no_answers(state, prepared)
    answered = {one.node for one in reports}
    with suppress(SlurmError):
        why = f"no answer before the probe ended ({state.state})"
        return Found(submission.mark, reports, {node: why for node in host_names(state.nodes) if node not in answered})
    raise PeerLost(f"Slurm does not say which nodes the probe had ({state.state})", "the same command again")


def _no_answers(state: JobState, prepared: Prepared) -> ConfigError | ResourceError:
    """What a probe's log says of its end; where there is none, the first node could not write it."""
    log = slurm_folder(prepared.run_dir) / f"probe-{state.job_id}.log"
    said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
    words = f"the probe, job {state.job_id}, ended {state.state} before any node answered"
    if said:
        last = next((line for line in reversed(said) if not line.startswith("hint: ")), "")
        hint = next((line.removeprefix("hint: ") for line in said if line.startswith("hint: ")), f"see {log}")
        kind = ConfigError if state.code == ConfigError.code else ResourceError
        return kind(f"{words}: {last}", hint)
    first: list[str] = []
    with suppress(SlurmError):
        first = host_names(state.nodes)[:1] if state.nodes else []
    if not first:
        return ResourceError(words, f"scontrol show job {state.job_id}")
    exclude = ",".join([*filter(None, [prepared.job.cluster.slurm.exclude]), *first])
    return ResourceError(
        f"{words}, and its first node, {first[0]}, has left no log", f"cluster.slurm.exclude={exclude}"
    )


def _job_file(run_dir: Path) -> Path:
    return slurm_folder(run_dir) / "probe-job.json"


def _note(run_dir: Path, submission: Submission) -> None:
    write_whole(_job_file(run_dir), json.dumps(asdict(submission)) + "\n")


def _cancel_earlier(run_dir: Path, say: Say) -> None:
    """End a probe that outlived the command that asked for it."""
    try:
        earlier = Submission(**json.loads(_job_file(run_dir).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return
    with suppress(SlurmError):
        job_id = earlier.job_id or find_by_comment(earlier.mark)
        if job_id and any(state.is_active for state in job_states(job_id)):
            cancel(job_id)
            say(f"an earlier probe, job {job_id}, is cancelled")


def _cancel(submission: Submission, say: Say) -> None:
    try:
        job_id = submission.job_id or find_by_comment(submission.mark)
        if job_id:
            cancel(job_id)
            say(f"the probe, job {job_id}, is cancelled; nothing is submitted")
    except SlurmError as error:
        say(f"the probe is not cancelled ({error}); it ends by itself. scancel {submission.job_id or '...'}")
