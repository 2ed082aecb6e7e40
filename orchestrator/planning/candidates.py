"""Candidates: every topology that a job leaves open, and what is legal of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from orchestrator.config.job import JobConfig, TopologyConfig, galore_spec
from orchestrator.planning.counts import TunerExtras, Workload, head_cost_in_layers
from orchestrator.planning.estimate import cluster_device, setup_of
from orchestrator.planning.goals import GOALS
from orchestrator.planning.memory import StageMemory, stage_memory
from orchestrator.planning.setup import Setup, fast_domain
from orchestrator.planning.timing import StagePass, StepTime, stage_passes
from parallel.capabilities import Proposal, Refusal, batch_refusals, divisors, model_refusals
from parallel.specs import ClusterSpec, ModelSpec
from parallel.stages import split_layers
from parallel.topology import Topology

SHORTEST_PART = 1024
"""Tokens of a row that a context-parallel rank has at least, where ``topology.cp`` is open: cut into less, a row spends
its time in the ring's hops."""


@dataclass(frozen=True)
class Question:
    """What all candidates of a job have in common.

    ``adapted``: paths of the linears that get an adapter. ``chosen``: names of weights that full
    tuning leaves alone, or that learn whole beside an adapter.
    """

    job: JobConfig
    model: ModelSpec
    cluster: ClusterSpec
    precision: str
    adapted: frozenset[str]
    chosen: frozenset[str] = frozenset()

    @cached_property
    def head_cost(self) -> float:
        """The output head's work in layers."""
        return head_cost_in_layers(self.model)


@dataclass(frozen=True)
class Candidate:
    """A layout that can run, with its estimates."""

    proposal: Proposal
    setup: Setup
    stages: tuple[tuple[int, ...], ...]
    length_multiple: int
    time: StepTime

    @cached_property
    def memory(self) -> tuple[StageMemory, ...]:
        """Bytes on each rank of every stage."""
        return stage_memory(self.setup)

    @cached_property
    def passes(self) -> tuple[StagePass, ...]:
        """What every stage needs for a micro-batch."""
        return stage_passes(self.setup)


@dataclass(frozen=True)
class Rejected:
    """A topology that cannot run, or is slower.

    ``needs_bytes``: of the fullest rank, where the topology is legal. ``step_s``: the estimated step of one that fits
    and is only slower; 0 for all others.
    """

    topology: str
    reason: str
    hint: str = ""
    needs_bytes: int = 0
    step_s: float = 0.0


def plainest(question: Question, topology: Topology, asked: TopologyConfig) -> Proposal:
    """A topology with all that is still open at its plainest; what forbids this forbids all of its settings."""
    job = question.job
    return Proposal(
        topology=topology,
        vpp=asked.vpp if (asked.vpp or 1) > 1 else None,
        sp=question.model.is_moe and topology.tp > 1 if asked.sp is None else asked.sp,
        global_sequences=job.batch.global_sequences,
        micro_sequences=job.batch.micro or 1,
        tuner=job.tuner.name,
        quantise=job.tuner.quantise,
        engine=job.engine.name,
        recompute=job.memory.recompute or "none",
        precision=question.precision,
        cp_comm=asked.cp_comm or "ring",
        distributed=bool(job.optimizer.distributed),
        optimizer=job.optimizer.name,
    )


def refusals_of(question: Question, proposal: Proposal) -> list[Refusal]:
    """Why a proposal cannot run, whatever its memory."""
    found = model_refusals(question.model, proposal)
    return found + world_refusals(proposal.topology, question.cluster) + batch_refusals(proposal)


def world_refusals(topology: Topology, cluster: ClusterSpec) -> list[Refusal]:
    """Why a topology does not fit the ranks of a cluster.

    One node may leave ranks idle; on several nodes all ranks must be used, for idle ones would still be paid for.
    """
    ranks = cluster.ranks
    hint = f"topology.dp={max(1, ranks // (topology.world_size // topology.dp))}"
    if topology.world_size > ranks:
        return [Refusal(f"topology needs {topology.world_size} ranks ({topology}) but cluster has {ranks}", hint)]
    if cluster.nodes > 1 and topology.world_size < ranks:
        message = (
            f"topology uses {topology.world_size} of {ranks} ranks ({topology}), but on cluster.nodes={cluster.nodes} "
            "all must be used"
        )
        return [Refusal(message, hint)]
    return []


def length_multiple(proposal: Proposal) -> int:
    """Rows are padded to a multiple of this: cp cuts them in two parts per rank, and sequence parallelism both by tp.

    Example:
        >>> length_multiple(Proposal(Topology(tp=4, cp=2))), length_multiple(Proposal(Topology(tp=4, cp=2), sp=True))
        (4, 8)
    """
    tp, cp = proposal.topology.tp if proposal.sp else 1, proposal.topology.cp
    return cp * math.lcm(2, tp) if cp > 1 else tp


def stages_of(question: Question, proposal: Proposal) -> tuple[tuple[int, ...], ...]:
    """Which layers lie on which chunk."""
    return split_layers(question.model.layers, proposal.topology.pp, proposal.vpp, head_cost=question.head_cost)


def set_up(question: Question, proposal: Proposal) -> Setup:
    """What memory and time of a proposal are estimated for."""
    job, multiple = question.job, length_multiple(proposal)
    work = Workload(
        model=question.model,
        proposal=proposal,
        stages=stages_of(question, proposal),
        row_tokens=-(-job.batch.sequence_tokens // multiple) * multiple,
        adapted=question.adapted,
        adapter_rank=job.tuner.r,
        device=question.cluster.device,
        extras=TunerExtras(job.tuner.dora, job.tuner.init == "pissa", question.chosen, galore_spec(job.optimizer)),
        goal=GOALS[job.objective.name],
    )
    return setup_of(work, question.cluster)


def open_topologies(question: Question) -> Iterator[TopologyConfig]:
    """Fill in the axes that the user left open, in every way that makes sense; what the user fixed stays.

    An open ``dp`` becomes the largest that the ranks allow and that divides the batch, and a larger one where that
    leaves every rank less to do (on several nodes: the one that uses all ranks). An open ``tp`` stays among GPUs that a
    fast link joins. The first has every open axis at its smallest.
    """
    asked, cluster = question.job.topology, question.cluster
    open_sizes = divisors(cluster.ranks) if cluster.nodes > 1 else list(range(1, cluster.ranks + 1))
    near = [size for size in open_sizes if size <= _domain(cluster)]
    for tp in [asked.tp] if asked.tp is not None else near:
        for pp in [asked.pp] if asked.pp is not None else open_sizes:
            smallest = all(size == 1 for size, fixed in ((tp, asked.tp), (pp, asked.pp)) if fixed is None)
            cuts = _model_cuts(question, tp, pp)
            for cp in _context_sizes(question, cluster.ranks // (tp * pp)) if cuts else [asked.cp or 1]:
                room = cluster.ranks // (tp * pp * cp)
                if room < (asked.dp or 1) and not (smallest and cp == (asked.cp or 1)):
                    continue  # the smallest is judged in any case, to have a reason
                for dp in [asked.dp] if asked.dp else _open_dp(question, pp, max(1, room)):
                    sizes = replace(asked, tp=tp, pp=pp, cp=cp, dp=dp)
                    yield from _expert_sizes(question, sizes) if cuts else [replace(sizes, ep=asked.ep or 1)]


def _domain(cluster: ClusterSpec) -> int:
    """Ranks among which an open ``tp`` stays: its collectives stand in the way of every layer, and programs overlap
    them on fast links only. Processes on a CPU have no such links."""
    if cluster.device == "cpu":
        return cluster.ranks
    return fast_domain(cluster_device(cluster), cluster.gpus_per_node)


def _model_cuts(question: Question, tp: int, pp: int) -> bool:
    """Whether the model can be cut so; where not, one topology with these sizes is enough to say so."""
    proposal = Proposal(Topology(tp=tp, pp=pp), sp=question.model.is_moe and tp > 1, precision=question.precision)
    return not model_refusals(question.model, proposal)


def _context_sizes(question: Question, room: int) -> list[int]:
    asked, cluster = question.job.topology.cp, question.cluster
    if asked is not None:
        return [asked]
    most = min(room, question.job.batch.sequence_tokens // SHORTEST_PART)
    return [cp for cp in range(1, max(1, most) + 1) if cluster.nodes == 1 or room % cp == 0]


def _expert_sizes(question: Question, sizes: TopologyConfig) -> Iterator[TopologyConfig]:
    """Open ``ep`` and ``etp``: what divides the experts and the ranks of a stage; experts are cut as dense layers or
    not at all."""
    model, stage_ranks = question.model, (sizes.tp or 1) * (sizes.cp or 1) * (sizes.dp or 1)
    whole = sizes.etp is not None or not model.is_moe
    for etp in [sizes.etp or 1] if whole else sorted({1, sizes.tp or 1}):
        if not whole and model.expert_ffn % etp:
            continue
        fixed = sizes.ep is not None or not model.is_moe
        for ep in [sizes.ep or 1] if fixed else divisors(model.experts):
            if fixed or stage_ranks % (ep * etp) == 0:
                yield replace(sizes, ep=ep, etp=etp)


def _open_dp(question: Question, pp: int, room: int) -> list[int]:
    """The largest that divides the batch, and the smallest larger one that leaves fewest micro-batches for a rank.

    Virtual chunks want micro-batches in rounds of pp: where a dp leaves such, it is one of those.
    """
    batch = question.job.batch
    if question.cluster.nodes > 1:
        return [room]
    micro_batches = batch.global_sequences // (batch.micro or 1)
    sizes = [size for size in divisors(micro_batches) if size <= room]
    in_rounds = [size for size in sizes if micro_batches // size % pp == 0]
    if in_rounds and (question.job.topology.vpp or 1) > 1:
        return [max(in_rounds)]
    fewest = -(-micro_batches // min(room, micro_batches))
    larger = -(-micro_batches // fewest)
    return [max(sizes), larger] if larger > max(sizes) else [max(sizes)]
