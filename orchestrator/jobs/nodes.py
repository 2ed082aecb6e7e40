"""Runs whose number of nodes may change from one start to the next."""

from __future__ import annotations

import dataclasses

from orchestrator.commands import Planned, plan_job
from orchestrator.config.job import ClusterConfig, JobConfig
from orchestrator.errors import ConfigError
from parallel.specs import SpecError


def node_range(cluster: ClusterConfig) -> tuple[int, int]:
    """Fewest and most nodes that a run may have; 0 where they are still to be found out.

    Example:
        >>> node_range(ClusterConfig(nodes=4)), node_range(ClusterConfig(nodes=8, fewest_nodes=2))
        ((4, 4), (2, 8))
    """
    return cluster.fewest_nodes or cluster.nodes, cluster.nodes


def spare_nodes(planned: Planned, nodes: int) -> str:
    """That a plan uses fewer than these nodes, in words; empty where it uses all."""
    used = planned.job.cluster.nodes
    if used >= nodes:
        return ""
    return f"{used} of {nodes} nodes are used: the batch cannot be cut for more of them, or a step is no shorter"


def plan_on(job: JobConfig, nodes: int) -> Planned:
    """The plan on ``nodes`` nodes; where the run may have fewer, on the most of them that can be used.

    The global batch, the order of samples and the schedule are the job's whatever the number of nodes. Where dp does
    not divide the batch, some ranks run a micro-batch without rows: fewer nodes are taken if a step is shorter on them.

    Raises:
        ConfigError, SpecError: no number of nodes can be used; the reason against the most.
    """
    fewest = min(nodes, node_range(job.cluster)[0] or nodes)
    reason: ConfigError | SpecError | None = None
    found: list[Planned] = []
    for count in range(nodes, fewest - 1, -1):
        try:
            found.append(plan_job(dataclasses.replace(job, cluster=dataclasses.replace(job.cluster, nodes=count))))
        except (ConfigError, SpecError) as error:
            reason = reason or error
        if found and not found[-1].plan.empty_micro_batches:
            break
    if not found:
        assert reason is not None
        raise reason
    return min(found, key=lambda planned: planned.plan.step_time.total_s)
