"""Timing: a small model of one optimizer step, made to rank topologies and not to promise seconds."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from orchestrator.planning.counts import Workload, stage_counts
from parallel.specs import ClusterSpec


@dataclass(frozen=True)
class Machine:
    """What one rank computes per second, and how fast ranks talk (bytes/s per rank; latency of one message in s)."""

    flops_fp32: float
    flops_bf16: float
    inside_node: float
    between_nodes: float
    latency_s: float


MACHINES = {
    # one or two desktop cores; gloo over loopback, measured between ranks that are busy computing (a message then waits
    # for its peer to be scheduled: 2 ranks all-reduce 1.2 MB in 6 ms, 4 ranks in 14 ms)
    "cpu": Machine(flops_fp32=1e11, flops_bf16=3e11, inside_node=5e8, between_nodes=1e8, latency_s=1.5e-3),
    # half of an H100's dense peak; NVLink; one 400 Gbit/s port per GPU
    "cuda": Machine(flops_fp32=3e13, flops_bf16=4e14, inside_node=2e11, between_nodes=4e10, latency_s=1e-5),
}


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step by cause, none of them hidden behind another."""

    compute_s: float
    bubble_s: float
    tensor_s: float
    pipeline_s: float
    data_s: float
    context_s: float = 0.0

    @property
    def total_s(self) -> float:
        """The step."""
        return sum(asdict(self).values())


def estimate_time(work: Workload, cluster: ClusterSpec) -> StepTime:
    """Estimate one optimizer step.

    The slowest stage sets the pace: ``m`` micro-batches of it, and a bubble of ``(pp - 1) / vpp`` more (Narayanan et
    al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters", section 2.2).
    """
    proposal, topology, machine = work.proposal, work.proposal.topology, MACHINES[work.device]
    compute = max(_micro_batch_compute_s(work, machine, stage) for stage in range(topology.pp))
    layers = max(stage_counts(work, stage).layers for stage in range(topology.pp))
    tensor = layers * _tensor_s(work, machine, _link(machine, topology.tp, cluster))
    context = layers * _context_s(work, machine, _link(machine, topology.tp * topology.cp, cluster))
    passes = proposal.micro_batches
    bubble = (topology.pp - 1) / (proposal.vpp or 1)
    trainable = max(stage_counts(work, stage).trainable for stage in range(topology.pp))
    return StepTime(
        compute_s=passes * compute,
        bubble_s=bubble * (compute + tensor + context),
        tensor_s=passes * tensor,
        pipeline_s=(passes + bubble) * _pipeline_s(work, machine, cluster),
        data_s=_all_reduce_s(
            4 * trainable, topology.dp * topology.cp, _link(machine, topology.stage_ranks, cluster), machine
        ),
        context_s=passes * context,
    )


def _micro_batch_compute_s(work: Workload, machine: Machine, stage: int) -> float:
    """Forward and backward of one micro-batch on one rank of a stage.

    Two operations per weight and token forward and two for the gradient of the input; two more for the gradient of
    the weights where those are trained, and two for full recomputation. Attention adds ``2 s`` per query feature
    forward (scores and values, half of them masked), and twice that backward.
    """
    counts, topology = stage_counts(work, stage), work.proposal.topology
    recompute = 2 if work.proposal.recompute == "full" else 0
    operations = (6 if work.proposal.tuner == "full" else 4) + recompute
    query_features = work.model.heads * work.model.attended_dim * counts.layers / topology.tp
    per_token = operations * counts.matmul + (6 + recompute) * work.row_tokens * query_features
    rate = machine.flops_fp32 if work.proposal.precision == "fp32" else machine.flops_bf16
    return work.micro_tokens / topology.cp * per_token / rate


def _tensor_s(work: Workload, machine: Machine, link: float) -> float:
    """Two all-reduces of one micro-batch's hidden states forward and two backward, in one layer."""
    size = work.micro_tokens // work.proposal.topology.cp * work.model.hidden * work.value_bytes
    return 4 * _all_reduce_s(size, work.proposal.topology.tp, link, machine)


def _context_s(work: Workload, machine: Machine, link: float) -> float:
    """What context-parallel ranks tell each other in one layer, for one micro-batch forward and backward.

    Ring: keys and values make ``cp - 1`` hops forward and as many backward, their fp32 gradients ``cp``. Ulysses:
    queries, keys, values and outputs are traded by an all-to-all each, forward and backward; of what a rank has,
    ``(cp - 1) / cp`` leaves it, and key/value heads too few to deal out are sent more than once.
    """
    model, proposal, topology = work.model, work.proposal, work.proposal.topology
    cp, recompute = topology.cp, work.proposal.recompute != "none"
    if cp == 1:
        return 0.0
    tokens, groups = work.micro_tokens / cp, model.kv_heads // topology.tp
    if proposal.cp_comm == "ulysses":
        dealt = 2 * model.heads // topology.tp + 2 * math.lcm(groups, cp)
        share = tokens * dealt * model.attended_dim * work.value_bytes * (cp - 1) / cp
        return (2 + recompute) * (share / link + 2 * (cp - 1) * machine.latency_s)
    hop = tokens * 2 * groups * model.attended_dim
    hops = (2 + recompute) * (cp - 1)
    return hops * (hop * work.value_bytes / link + machine.latency_s) + cp * (hop * 4 / link + machine.latency_s)


def _pipeline_s(work: Workload, machine: Machine, cluster: ClusterSpec) -> float:
    """One send forward and one backward of a micro-batch's hidden states between stages."""
    topology = work.proposal.topology
    if topology.pp == 1:
        return 0.0
    size = work.micro_tokens // topology.cp * work.model.hidden * work.value_bytes
    # one hop per virtual chunk; stages are the slowest axis, so they are the first to be on different nodes
    return 2 * (work.proposal.vpp or 1) * (size / _link(machine, topology.world_size, cluster) + machine.latency_s)


def _all_reduce_s(size: int, ranks: int, link: float, machine: Machine) -> float:
    """A ring all-reduce: ``2 (n - 1) / n`` of the bytes over every link, in ``2 (n - 1)`` messages."""
    if ranks == 1:
        return 0.0
    return 2 * (ranks - 1) * (size / ranks / link + machine.latency_s)


def _link(machine: Machine, span: int, cluster: ClusterSpec) -> float:
    """The slowest link among ``span`` neighbouring ranks."""
    return machine.inside_node if span <= cluster.gpus_per_node else machine.between_nodes
