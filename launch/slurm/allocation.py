"""What Slurm has given to a job, read from the variables of its batch script."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from launch.environment import LaunchError


@dataclass(frozen=True)
class Allocation:
    """The nodes of a job and what each has, as far as Slurm says; 0 where it does not.

    ``job_id``: as commands take it (``12``, ``12_3`` for a task of an array). ``restarts``: how often it was requeued.
    ``ranks_per_node``: what ``--ntasks-per-node`` asked for. ``task``: which one of an array this is; None outside of
    one.
    """

    job_id: str
    nodes: int
    node_list: str
    restarts: int = 0
    ranks_per_node: int = 0
    gpus_per_node: int = 0
    cpus_per_node: int = 1
    memory_mib: int = 0
    task: int | None = None


def read_allocation(variables: Mapping[str, str]) -> Allocation:
    """The allocation that ``SLURM_*`` variables of a batch script describe.

    Raises:
        LaunchError: this is no job of Slurm's.
    Example:
        >>> read_allocation({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}).nodes
        2
    """
    if not {"SLURM_JOB_ID", "SLURM_JOB_NUM_NODES", "SLURM_JOB_NODELIST"} <= set(variables):
        raise LaunchError("this is no job of Slurm's: SLURM_JOB_ID is not set", "isotrain submit KEY=VALUE ...")
    job_id, task = variables["SLURM_JOB_ID"], None
    if "SLURM_ARRAY_TASK_ID" in variables:  # the raw id of an array's last task is also that of the whole array
        task = int(variables["SLURM_ARRAY_TASK_ID"])
        job_id = f"{variables['SLURM_ARRAY_JOB_ID']}_{task}"
    cpus = _number(variables, "SLURM_CPUS_ON_NODE")
    per_cpu = _number(variables, "SLURM_MEM_PER_CPU")
    return Allocation(
        job_id=job_id,
        nodes=int(variables["SLURM_JOB_NUM_NODES"]),
        node_list=variables["SLURM_JOB_NODELIST"],
        restarts=_number(variables, "SLURM_RESTART_COUNT"),
        ranks_per_node=_number(variables, "SLURM_NTASKS_PER_NODE"),
        gpus_per_node=_number(variables, "SLURM_GPUS_ON_NODE"),
        cpus_per_node=max(1, cpus),
        memory_mib=_number(variables, "SLURM_MEM_PER_NODE") or per_cpu * cpus,
        task=task,
    )


def _number(variables: Mapping[str, str], name: str) -> int:
    """A whole number; 0 when it is missing, or a list for nodes that differ."""
    text = variables.get(name, "")
    return int(text) if text.isdigit() else 0
