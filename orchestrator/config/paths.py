"""Paths of a job, made absolute as soon as it is composed: a run goes on from any folder that it is resumed from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from orchestrator.config.job import JobConfig

BUILTIN = "builtin:"


def with_absolute_paths(job: JobConfig) -> JobConfig:
    """The same job, with its files and folders named from the root; relative paths start at the current folder.

    Hub ids and ``builtin:`` data stay as they are.

    Example:
        >>> with_absolute_paths(JobConfig(run_dir="/runs/first")).run_dir
        '/runs/first'
    """
    model, data, tuner = job.model.path, job.data.path, job.tuner.path
    return replace(
        job,
        run_dir=_absolute(job.run_dir),
        model=replace(job.model, path=_absolute(model) if _is_folder(model) else model),
        data=replace(job.data, path=data if data and data.startswith(BUILTIN) else _absolute(data)),
        tuner=replace(job.tuner, path=_absolute(tuner)),
        cluster=replace(
            job.cluster,
            profile=_absolute(job.cluster.profile),
            slurm=replace(job.cluster.slurm, secrets=_absolute(job.cluster.slurm.secrets)),
        ),
    )


def _absolute(path: str | None) -> str | None:
    return str(Path(path).expanduser().absolute()) if path else path


def _is_folder(path: str | None) -> bool:
    return bool(path) and Path(str(path)).expanduser().is_dir()
