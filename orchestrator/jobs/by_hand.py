"""The job of ``sbatch slurm/train.sbatch WORDS``: composed in the allocation, whose nodes are its cluster."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from launch.slurm.allocation import Allocation
from orchestrator.config.job import AUTO, ClusterConfig, JobConfig
from orchestrator.config.loading import compose_job


def by_hand(overrides: Sequence[str], allocation: Allocation) -> JobConfig:
    """The job that was typed after ``sbatch slurm/train.sbatch``, on the cluster that the allocation is.

    Nodes and ranks per node are the allocation's always; device and memory unless ``cluster=`` names them. A folder
    without ``run_dir`` is named after the job, so that it is the same one after a requeue.
    """
    job = compose_job(overrides)
    named = any(text.startswith("cluster=") for text in overrides)
    if job.cluster.name == AUTO:  # its nodes are looked at when it is planned
        return dataclasses.replace(job, run_dir=_folder(job, allocation))
    cluster = job.cluster if named else cluster_of(allocation, job.cluster)
    on_node = (allocation.gpus_per_node if cluster.device == "cuda" else 0) or (cluster.gpus_per_node if named else 1)
    nodes, ranks = allocation.nodes, allocation.ranks_per_node or on_node
    fewest = min(nodes, cluster.fewest_nodes) if cluster.fewest_nodes else None
    cluster = dataclasses.replace(cluster, nodes=nodes, fewest_nodes=fewest, gpus_per_node=ranks)
    return dataclasses.replace(job, cluster=cluster, run_dir=_folder(job, allocation))


def _folder(job: JobConfig, allocation: Allocation) -> str:
    name = Path(job.model.path or "model").name.lower()
    return job.run_dir or str(Path("runs", f"{name}-job-{allocation.job_id}").absolute())


def cluster_of(allocation: Allocation, otherwise: ClusterConfig) -> ClusterConfig:
    """What the nodes are: GPUs where Slurm has given some and torch sees them, else processes that share the memory."""
    changes: dict[str, object] = {"name": "allocation"}
    ranks = allocation.ranks_per_node or 1
    memory_mib = allocation.memory_mib or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20
    changes["memory_gib"] = round(memory_mib / 1024 / ranks, 1)
    if allocation.gpus_per_node:
        import torch

        if torch.cuda.is_available():
            total = torch.cuda.get_device_properties(0).total_memory / 2**30
            changes |= {"device": "cuda", "memory_gib": round(0.95 * total, 1)}  # the driver and nccl take their share
    return dataclasses.replace(otherwise, **changes)  # type: ignore[arg-type]
