"""What the commands do, without a terminal: plan, train, resume, export; for the command line and for Python users."""

from __future__ import annotations

import dataclasses
import errno
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launch.environment import ledger_file
from launch.exits import RankExit
from launch.launcher import render
from launch.local import launch
from launch.request import LaunchRequest, Rendered
from orchestrator.config.building import as_override, differences, read_job
from orchestrator.config.job import ClusterConfig, JobConfig, ModelConfig
from orchestrator.config.loading import compose_job, override_job
from orchestrator.detection.cluster import found_cluster, on_cluster
from orchestrator.errors import ConfigError, ExitCode
from orchestrator.locking import locked
from orchestrator.models import model_spec, resolve_model
from orchestrator.planning.experts import dependence_on_cut
from orchestrator.planning.goals import check_trainable
from orchestrator.recovery import REWOUND, patience, progress, run_ranks
from orchestrator.runs import Decision, decide_resume, decide_train, default_run_dir, latest_step, write_run
from parallel.specs import ModelSpec

if TYPE_CHECKING:
    from orchestrator.explaining import Explanation
    from orchestrator.planning.advice import Advice
    from orchestrator.planning.plan import Plan
    from orchestrator.planning.search import Found

Say = Callable[[str], None]


@dataclass(frozen=True)
class Planned:
    """A job, the model's shape, the plan to run it, and what was weighed for it."""

    job: JobConfig
    model: ModelSpec
    plan: Plan
    weighed: Found | None = None

    @property
    def words(self) -> str:
        """What will run, in a line."""
        plan = self.plan
        idle = f", {plan.ranks_idle} idle" if plan.ranks_idle else ""
        return f"plan: {plan.topology} on {plan.ranks_used} ranks{idle}, {plan.precision} on {plan.device}"

    @property
    def warning(self) -> str:
        """What speaks against the plan without forbidding it; empty when nothing does."""
        from orchestrator.planning.certified import warning

        lines = [warning(self.job, self.plan, self.model.family), *dependence_on_cut(self.job.experts)]
        return "\n".join(line for line in lines if line)


@dataclass(frozen=True)
class Finished:
    """How a run ended. ``step``: optimizer steps that the newest checkpoint holds; ``cause``: None when all is well."""

    run_dir: Path
    code: int
    step: int
    message: str
    cause: RankExit | None = None

    def summary(self) -> dict[str, object]:
        """What ``--json`` prints; ``error`` is there when the code is not 0."""
        values = {"run_dir": str(self.run_dir), "code": int(self.code), "step": self.step, "message": self.message}
        error = {"error": self.message} if self.code else {}
        cause = {"cause": self.cause.cause, "rank": self.cause.rank} if self.cause else {}
        return values | {"hint": self.cause.hint if self.cause else ""} | error | cause


def plan_job(job: JobConfig) -> Planned:
    """Plan a job; nothing is started and nothing is written.

    Raises:
        ConfigError, SpecError: the job cannot work on its cluster; says why, with a hint.
    """
    from orchestrator.ledger import corrected
    from orchestrator.planning.plan import decide

    model, cluster = model_spec(job.model), found_cluster(job.cluster)
    made, weighed = decide(job, model, cluster)
    plan = corrected(made, job, model, ledger_file())
    return Planned(on_cluster(job, cluster), model, plan, weighed)


def plan_advice(planned: Planned) -> Advice:
    """What a plan achieves, and what fewer ranks or one change would do."""
    from orchestrator.planning.advice import advise

    return advise(planned.job, planned.model, found_cluster(planned.job.cluster), planned.plan, planned.weighed)


def explain_choice(overrides: Sequence[str], asked: Sequence[str]) -> list[str]:
    """One choice, or several together (``asked``: overrides), against the plan without it.

    Raises:
        ConfigError, SpecError: the job cannot work without the choice, or the choice is no setting.
    """
    from orchestrator.config.loading import compose_job
    from orchestrator.planning.advice import why

    planned = plan_job(compose_job(list(overrides)))
    other = compose_job([*overrides, *asked])
    model = model_spec(other.model)
    return why(planned.job, model, found_cluster(other.cluster), planned.plan, other)


def rendered_launch(planned: Planned, run_dir: Path) -> Rendered:
    """The command that will start a plan's ranks, before anything is done."""
    cluster = planned.job.cluster
    return render(
        LaunchRequest(
            run_dir=run_dir,
            program=(sys.executable, "-m", "orchestrator", "worker", str(run_dir)),
            world_size=planned.plan.ranks_used,
            nodes=cluster.nodes,
            ranks_per_node=cluster.gpus_per_node,
            device=cluster.device,
        )
    )


def train(overrides: Sequence[str], say: Say = lambda text: None) -> Finished:
    """Train, from the start or on from the newest checkpoint of ``run_dir``; returns when all ranks have ended.

    Args:
        overrides: ``GROUP=CHOICE`` and ``KEY=VALUE`` in Hydra's grammar.
        say: tells the user what happens, a line at a time.
    Raises:
        ConfigError: the job cannot work, or the folder holds another run.
    """
    job = compose_job(overrides)
    run_dir = run_folder(job)
    return _run(job, run_dir, decide_train(run_dir, job), say)


def run_folder(job: JobConfig) -> Path:
    """Where a job's run is kept: its ``run_dir``, or a new folder in ``runs/``."""
    return Path(job.run_dir or default_run_dir(job.model.path)).absolute()


def resume(run_dir: Path, overrides: Sequence[str] = (), say: Say = lambda text: None) -> Finished:
    """Go on with a run, with changes; its topology may be another one.

    Raises:
        ConfigError: there is no run or no checkpoint, or the changes cannot work.
    """
    run_dir = run_dir.expanduser().absolute()
    before, job = _before_and_now(run_dir, overrides)
    decision = decide_resume(run_dir, job)
    for key, old, new in differences(before, job):
        say(f"changed: {key} from {as_override(old)} to {as_override(new)}")
    return _run(job, run_dir, decision, say)


def explain(run_dir: Path, overrides: Sequence[str] = ()) -> Explanation:
    """What :func:`resume` would restore, and what has changed; starts and writes nothing.

    Raises:
        ConfigError: as :func:`resume`. DataError: no checkpoint is good.
    """
    from orchestrator.explaining import explain_resume

    run_dir = run_dir.expanduser().absolute()
    before, job = _before_and_now(run_dir, overrides)
    decide_resume(run_dir, job)
    if job.data.path is not None:  # a run that came in from another tool need not have any yet
        check_files(job, "resume")
    return explain_resume(run_dir, before, job, plan_job(job).plan)


def _before_and_now(run_dir: Path, overrides: Sequence[str]) -> tuple[JobConfig, JobConfig]:
    before = read_job(run_dir)
    text = (run_dir / "job.yaml").read_text(encoding="utf-8")
    return before, override_job(text, overrides) if overrides else before


def _run(job: JobConfig, run_dir: Path, decision: Decision, say: Say) -> Finished:
    if decision.kind == "finished":
        return Finished(run_dir, 0, decision.step, decision.message)
    check_files(job, decision.kind)
    planned = plan_job(_on_one_node(job))
    check_device(planned.job.cluster)
    rendered = rendered_launch(planned, run_dir)
    make_folder(run_dir)
    say(decision.message)
    say(planned.words)
    if planned.warning:
        say(planned.warning)
    from orchestrator.pages.run_page import report_end

    with locked(run_dir):
        write_run(run_dir, dataclasses.replace(job, run_dir=str(run_dir)), planned.plan.to_json())
        result, given_up = run_ranks(
            lambda attempt: launch(
                rendered, run_dir, planned.plan.ranks_used, say, patience(job.recovery), lambda: progress(run_dir)
            ),
            run_dir,
            job.recovery.restarts,
            say,
            lambda end: end.stopped,
        )
        report_end(run_dir)
    finished = ended(run_dir, job.steps, result.code, result.cause)
    if not (given_up and result.cause):
        return finished
    hint = result.cause.hint if result.cause.cause == REWOUND else f"isotrain logs {run_dir}"  # not: the same again
    return Finished(run_dir, ExitCode.GAVE_UP, finished.step, given_up, dataclasses.replace(result.cause, hint=hint))


def _on_one_node(job: JobConfig) -> JobConfig:
    """A job that may have one node, on one: what starts ranks without Slurm has no more."""
    nodes = 1 if job.cluster.fewest_nodes == 1 else job.cluster.nodes
    return dataclasses.replace(job, cluster=dataclasses.replace(job.cluster, nodes=nodes))


def ended(run_dir: Path, steps: int, code: int, cause: RankExit | None) -> Finished:
    """How a run of ``steps`` ended, with the words for its user: the launch's exit code and its first cause."""
    step = latest_step(run_dir) or 0
    if code == ExitCode.DONE:
        return Finished(run_dir, 0, step, f"done: {step} of {steps} steps in {run_dir}")
    if code == ExitCode.INTERRUPTED and cause is not None:
        again = dataclasses.replace(cause, hint=f"isotrain resume {run_dir}")
        return Finished(run_dir, code, step, f"interrupted; {step} of {steps} steps are saved", again)
    if cause is None:
        return Finished(run_dir, code, step, f"ended at once; the newest checkpoint holds {step} steps")
    return Finished(run_dir, code, step, cause.message, cause)


def check_device(cluster: ClusterConfig) -> None:
    """Find out before anything is started that this machine has not the GPUs that the cluster names.

    Raises:
        ConfigError: torch sees none, or fewer.
    """
    if cluster.device != "cuda":
        return
    import torch

    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if there < cluster.gpus_per_node:
        build = "" if torch.version.cuda else " (this build of torch is for CPUs only)"
        raise ConfigError(
            f"cluster={cluster.name} has {cluster.gpus_per_node} GPUs per node, but torch sees {there} here{build}",
            "cluster=laptop  (isotrain plan works for any cluster)",
        )


def check_files(job: JobConfig, kind: str = "start") -> None:
    """Find out before anything is started that the model or the data are not there, or the objective is not built.

    Raises:
        ConfigError: says what was searched, or what trains.
    """
    from orchestrator.data.sources import resolve

    check_trainable(job.objective.name)
    check_model(job.model)
    resolve(job.data.path)
    if job.tuner.path and kind == "start":  # a resumed run has its adapter in the checkpoint
        from orchestrator.assemble import check_adapter  # needs torch, which takes two seconds to import

        check_adapter(job, model_spec(job.model))


def check_model(model: ModelConfig) -> None:
    """:func:`check_files` for the model alone."""
    if model.weights == "load" or model.config is None:
        folder = resolve_model(model.path, model.download)
        if model.weights == "load" and not any(folder.glob("*.safetensors")):
            from orchestrator.checkpoint.hf_reader import weight_files

            weight_files(folder)  # raises: says what there is instead


def make_folder(run_dir: Path) -> None:
    """Make the run folder, or find out that it cannot be made or written before anything is started.

    Raises:
        ConfigError: names the folder and the reason.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ConfigError(f"run_dir={run_dir} cannot be made: {error.strerror}", "run_dir=ANOTHER") from error
    if not os.access(run_dir, os.W_OK | os.X_OK):
        raise ConfigError(f"run_dir={run_dir} cannot be written: permission denied", "run_dir=ANOTHER")
