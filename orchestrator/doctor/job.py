"""The job itself: its model, its data, its run folder and its plan."""

from __future__ import annotations

from pathlib import Path

from launch.environment import isotrain_cache
from orchestrator.commands import Planned, check_model, plan_job, rendered_launch
from orchestrator.config.job import JobConfig
from orchestrator.data import prepare
from orchestrator.data.sources import resolve
from orchestrator.doctor.finding import Finding, judged
from orchestrator.locking import locked, read_holder
from orchestrator.models import resolve_model
from orchestrator.planning.goals import check_trainable
from orchestrator.planning.memory import GIB
from orchestrator.runs import decide_train

NOTHING_NAMED = Finding(
    "job",
    "warning",
    "neither a model nor data is named: only this machine is looked at",
    "isotrain doctor model=smollm2_135m data=lighthouse",
)
READ_WHOLE_BYTES = 8 * 2**20  # data files up to this size are tokenised, into the cache where a run finds them


def is_named(job: JobConfig) -> bool:
    """Whether there is a job at all, or only a machine to look at.

    Example:
        >>> is_named(JobConfig())
        False
    """
    return bool(job.model.path or job.model.config or job.data.path)


def check_job_model(job: JobConfig) -> Finding:
    """Whether the model is on this machine, with weights that can be read."""

    def look() -> str:
        check_model(job.model)
        return str(resolve_model(job.model.path))

    return judged("model", look)


def check_data(job: JobConfig) -> Finding:
    """Whether the data are there and can be tokenised."""
    return judged("data", lambda: look_at_data(job))


def look_at_data(job: JobConfig) -> str:
    """Tokenise the data into the cache, where the run finds them, and say how much there is; not of large files.

    Raises:
        ConfigError, DataError, ResourceError: as the run would end with.
    """
    check_trainable(job.objective.name)
    file = resolve(job.data.path)
    size = file.stat().st_size
    if size > READ_WHOLE_BYTES:
        return f"{file}, {size / 1e6:,.0f} MB: too large to be read for a look"
    model, cache = resolve_model(job.model.path), isotrain_cache() / "tokens"
    tokens = prepare(job.data, job.objective, model, job.batch.sequence_tokens, cache)
    return tokens.summary.epochs(job.steps, job.batch.global_sequences).removeprefix("data: ")


def check_run_folder(job: JobConfig, run_dir: Path) -> Finding:
    """Whether the run may be kept in its folder: it is new, or holds the same run, and nobody trains in it."""

    def look() -> str:
        message = decide_train(run_dir, job).message
        if read_holder(run_dir) is not None:
            with locked(run_dir):  # what a killed launch has left is free
                pass
        return message

    return judged("run", look)


def check_plan(job: JobConfig, run_dir: Path, is_local: bool) -> tuple[Finding, Planned | None]:
    """Whether there is a plan, and on this machine a command for it; with the plan."""
    made: list[Planned] = []

    def look() -> str:
        made.append(plan_job(job))
        if is_local:
            rendered_launch(made[0], run_dir)
        return made[0].words.removeprefix("plan: ")

    finding = judged("plan", look)
    if finding.state == "ok" and made[0].warning:
        finding = Finding("plan", "warning", made[0].warning)
    return finding, made[0] if made else None


def planned_gib(planned: Planned) -> float:
    """Memory of all ranks together, as the plan estimates it."""
    plan = planned.plan
    return plan.ranks_used / len(plan.memory) * sum(stage.total for stage in plan.memory) / GIB
