"""``isotrain doctor``: look, judge, show."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.command import WIDTH_ELSEWHERE, add_overrides
from orchestrator.errors import ExitCode

if TYPE_CHECKING:
    from orchestrator.commands import Planned
    from orchestrator.config.job import JobConfig
    from orchestrator.doctor.finding import Finding

COLOURS = {"ok": "green", "warning": "yellow", "fault": "red"}


def add_doctor(parser: argparse.ArgumentParser) -> None:
    """The job that would be run."""
    add_overrides(parser)


def run_doctor(arguments: argparse.Namespace) -> int:
    """Examine, show the table, and end with 0 only if a run would start."""
    from rich.console import Console

    with Console(stderr=True).status("looking (two processes that meet take a few seconds)"):  # on a terminal only
        findings = examine(arguments.overrides)
    faults = [one for one in findings if one.state == "fault"]
    code = ExitCode.RED if faults else ExitCode.DONE
    if arguments.json:
        print(json.dumps({"code": int(code), "findings": [asdict(one) for one in findings]}))
        return int(code)
    _show(findings)
    for one in findings:
        if one.hint:
            print(f"{one.state}: {one.subject}: {one.found}\nhint: {one.hint}", file=sys.stderr)
    count = f"{len(faults)} fault{'s' if len(faults) > 1 else ''}"
    print(f"no run would start: {count}" if faults else "a run would start", file=sys.stderr)
    return int(code)


def examine(overrides: Sequence[str]) -> list[Finding]:
    """Everything that is known about a job, or about this machine where no model and no data are named.

    Raises:
        ConfigError: the words are no job.
    """
    from launch.environment import scheduler_job
    from orchestrator.commands import run_folder
    from orchestrator.config.loading import compose_job
    from orchestrator.detection.cluster import found_cluster, on_cluster
    from orchestrator.doctor import job as jobs
    from orchestrator.doctor import slurm

    job = compose_job(overrides)
    job = on_cluster(job, found_cluster(job.cluster))
    run_dir = run_folder(job)
    is_slurm = slurm.goes_through_slurm(job.cluster)
    is_elsewhere = is_slurm and not scheduler_job()
    seen = slurm.seen_slurm()
    findings, planned = [jobs.NOTHING_NAMED], None
    if jobs.is_named(job):
        plan, planned = jobs.check_plan(job, run_dir, is_local=not is_slurm)
        findings = [jobs.check_job_model(job), jobs.check_data(job), jobs.check_run_folder(job, run_dir), plan]
        if is_elsewhere and seen.is_there and not seen.error and plan.state != "fault":
            findings.append(slurm.check_submission(overrides))
    return [
        *_software(job, is_elsewhere),
        *([] if is_elsewhere else _machine(job, planned)),
        *_meeting(job),
        *_folder(job),
        *slurm.check_slurm(seen, job.cluster),
        *findings,
    ]


def _software(job: JobConfig, is_elsewhere: bool) -> list[Finding]:
    from orchestrator.detection.host import seen_accelerators
    from orchestrator.doctor import software

    accelerators = seen_accelerators()
    return [
        software.check_python(),
        *software.check_versions(software.seen_versions()),
        software.check_cuda(accelerators, job.cluster, is_elsewhere),
        software.check_devices(accelerators, job.cluster, is_elsewhere),
        *software.check_fast_paths(software.seen_libraries(), job.cluster.device, job.tuner.quantise),
    ]


def _machine(job: JobConfig, planned: Planned | None) -> list[Finding]:
    from launch.environment import usable_cores
    from orchestrator.detection.host import available_memory_bytes
    from orchestrator.doctor import machine
    from orchestrator.doctor.job import planned_gib

    cluster = job.cluster
    ranks = planned.plan.ranks_used // cluster.nodes if planned else cluster.gpus_per_node
    findings = [machine.check_cores(ranks, usable_cores(), cluster.device)]
    if cluster.device == "cpu":
        needed = planned_gib(planned) / cluster.nodes if planned else cluster.gpus_per_node * cluster.memory_gib
        available = available_memory_bytes() / machine.GIB
        findings.append(machine.check_memory(needed, available, planned is not None))
    return findings


def _meeting(job: JobConfig) -> list[Finding]:
    from launch.pool import Pool
    from orchestrator.doctor import machine

    pool = Pool(machine.WORLD, log=Path(os.devnull))
    try:
        error = machine.met(pool)
    finally:
        pool.leave()
    return [*machine.check_ports(machine.seen_ports(), job.cluster), machine.check_group(error)]


def _folder(job: JobConfig) -> list[Finding]:
    from launch.environment import slurm_step
    from orchestrator.commands import run_folder
    from orchestrator.doctor import folder, shared

    seen, step = folder.seen_folder(run_folder(job)), slurm_step()
    is_on_nodes = step is not None and step[2] > 1
    findings = [folder.check_folder(seen, job.cluster, is_on_nodes)]
    if seen.error:
        return findings
    if step is not None and is_on_nodes:
        findings.append(shared.check_tasks(seen.folder, shared.seen_tasks(seen.folder, step), step[2]))
    return [*findings, folder.check_lock(seen), folder.check_clock(seen), folder.check_speed(seen)]


def _show(findings: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("check", "state", "found", box=None, pad_edge=False)
    for one in findings:
        table.add_row(Text(one.subject), Text(one.state, style=COLOURS[one.state]), Text(one.found))
    Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH_ELSEWHERE).print(table)
