"""Candidates: every topology that a job leaves open, judged one by one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from orchestrator.config.job import JobConfig, TopologyConfig
from orchestrator.planning.counts import TunerExtras, Workload, head_cost_in_layers
from orchestrator.planning.estimate import setup_of
from orchestrator.planning.memory import GIB, StageMemory, stage_memory
from orchestrator.planning.timing import StepTime, step_time
from parallel.capabilities import Proposal, Refusal, batch_refusals, divisors, model_refusals
from parallel.specs import ClusterSpec, ModelSpec
from parallel.stages import split_layers
from parallel.topology import Topology, TopologyError


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


@dataclass(frozen=True)
class Candidate:
    """A topology that can run, with its estimates."""

    proposal: Proposal
    stages: tuple[tuple[int, ...], ...]
    length_multiple: int
    memory: tuple[StageMemory, ...]
    time: StepTime


@dataclass(frozen=True)
class Rejected:
    """A topology that cannot run, or is slower.

    ``needs_bytes``: of the fullest rank, when all that the topology lacks is memory. ``step_s``: the estimated step of
    one that is only slower.
    """

    topology: str
    reason: str
    hint: str = ""
    needs_bytes: int = 0
    step_s: float = 0.0


def judge(question: Question, asked: TopologyConfig) -> Candidate | Rejected:
    """Judge one topology whose sizes are all given."""
    sizes = {axis: getattr(asked, axis) or 1 for axis in ("pp", "dp", "cp", "tp", "ep", "etp")}
    try:
        topology = Topology(**sizes)
    except TopologyError as error:
        return Rejected(" ".join(f"{axis}={size}" for axis, size in sizes.items()), str(error), error.hint)
    job = question.job
    proposal = Proposal(
        topology=topology,
        vpp=asked.vpp if (asked.vpp or 1) > 1 else None,
        sp=question.model.is_moe and topology.tp > 1 if asked.sp is None else asked.sp,
        global_sequences=job.batch.global_sequences,
        micro_sequences=job.batch.micro_sequences,
        tuner=job.tuner.name,
        quantise=job.tuner.quantise,
        engine=job.engine.name,
        recompute=job.memory.recompute,
        precision=question.precision,
        cp_comm=asked.cp_comm or "ring",
    )
    found = model_refusals(question.model, proposal)
    found += world_refusals(topology, question.cluster)
    found += batch_refusals(proposal)
    if found:
        return Rejected(str(topology), found[0].message, found[0].hint)
    return _weigh(question, proposal)


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


def _weigh(question: Question, proposal: Proposal) -> Candidate | Rejected:
    """Estimate a legal topology's memory and time; reject it when it does not fit."""
    job, model, topology = question.job, question.model, proposal.topology
    stages = split_layers(model.layers, topology.pp, proposal.vpp, head_cost=head_cost_in_layers(model))
    multiple = length_multiple(proposal)
    work = Workload(
        model=model,
        proposal=proposal,
        stages=stages,
        row_tokens=-(-job.batch.sequence_tokens // multiple) * multiple,
        adapted=question.adapted,
        adapter_rank=job.tuner.r,
        distributed_optimizer=job.optimizer.distributed,
        device=question.cluster.device,
        extras=TunerExtras(job.tuner.dora, job.tuner.init == "pissa", question.chosen),
    )
    setup = setup_of(work, question.cluster)
    memory = stage_memory(setup)
    fullest = max(range(len(memory)), key=lambda stage: memory[stage].total)
    needs = memory[fullest]
    if needs.total > question.cluster.memory_gib * GIB:
        owner = needs.largest
        reason = (
            f"stage {fullest} needs {needs.total / GIB:.1f} GiB per rank "
            f"({owner} {getattr(needs, owner) / GIB:.1f} GiB), but cluster.memory_gib={question.cluster.memory_gib:g}"
        )
        return Rejected(str(topology), reason, needs_bytes=needs.total)
    return Candidate(proposal, stages, multiple, memory, step_time(setup))


def open_topologies(question: Question) -> Iterator[TopologyConfig]:
    """Fill in what the user left open, in every way that makes sense; what the user fixed stays.

    An open ``dp`` becomes the largest that the ranks allow and that divides the batch (on several nodes: the one that
    uses all ranks). The first has every open axis at its smallest.
    """
    asked, cluster = question.job.topology, question.cluster
    open_sizes = divisors(cluster.ranks) if cluster.nodes > 1 else list(range(1, cluster.ranks + 1))
    for tp in [asked.tp] if asked.tp is not None else open_sizes:
        for pp in [asked.pp] if asked.pp is not None else open_sizes:
            room = cluster.ranks // (tp * pp * (asked.cp or 1))
            smallest = all(size == 1 for size, fixed in ((tp, asked.tp), (pp, asked.pp)) if fixed is None)
            if smallest or room >= (asked.dp or 1):  # the smallest is judged in any case, to have a reason
                yield replace(asked, tp=tp, pp=pp, dp=asked.dp or _largest_dp(question, pp, max(1, room)))


def _largest_dp(question: Question, pp: int, room: int) -> int:
    """Virtual chunks want micro-batches in rounds of pp: where a dp leaves such, it is one of those."""
    batch = question.job.batch
    if question.cluster.nodes > 1:
        return room
    micro_batches = batch.global_sequences // batch.micro_sequences
    sizes = [size for size in divisors(micro_batches) if size <= room]
    in_rounds = [size for size in sizes if micro_batches // size % pp == 0]
    return max(in_rounds if in_rounds and (question.job.topology.vpp or 1) > 1 else sizes)


def nearest_legal(question: Question) -> str:
    """The smallest change of what the user fixed that makes a plan, as text to type; empty when there is none.

    Fewest keys first, then the smallest ratios, then dp before pp before tp.
    """
    asked = question.job.topology
    best: tuple[tuple[int, float, int], str] | None = None
    for sizes in _all_topologies(question):
        changes = _changes(asked, sizes)
        far = sum(abs(math.log2(new / old)) for _, old, new in changes if isinstance(new, int) and new)
        priority = max((("dp", "pp", "tp").index(key) for key, _, _ in changes if key in ("dp", "pp", "tp")), default=0)
        cost = (len(changes), round(far, 9), priority)
        if changes and (best is None or cost < best[0]) and isinstance(judge(question, sizes), Candidate):
            best = cost, " ".join(f"topology.{key}={_typed(new)}" for key, _, new in changes)
    return best[1] if best else ""


def _changes(asked: TopologyConfig, sizes: TopologyConfig) -> list[tuple[str, Any, Any]]:
    """What the user fixed that is otherwise in ``sizes``: key, asked value, other value."""
    keys = ("tp", "pp", "vpp", "cp", "ep", "etp", "dp", "sp", "cp_comm")
    every = [(key, getattr(asked, key), getattr(sizes, key)) for key in keys]
    return [(key, old, new) for key, old, new in every if old is not None and old != new]


def _typed(value: int | str | None) -> str:
    """A value as Hydra's override grammar spells it."""
    return "null" if value is None else str(value).lower()


def _all_topologies(question: Question) -> Iterator[TopologyConfig]:
    """Every topology on the cluster; the axes that the plan never derives are as asked or off."""
    asked, ranks, nodes = question.job.topology, question.cluster.ranks, question.cluster.nodes
    sizes = divisors(ranks) if nodes > 1 else list(range(1, ranks + 1))
    switches = [{getattr(asked, axis) or 1, 1} for axis in ("cp", "ep", "etp")]
    kinds = {asked.cp_comm, "ring" if asked.cp_comm else None}
    settings = product({asked.sp, False if asked.sp else asked.sp}, {asked.vpp, None}, kinds, *switches)
    for sp, vpp, kind, cp, ep, etp in settings:
        base = TopologyConfig(vpp=vpp, cp=cp, ep=ep, etp=etp, sp=bool(sp), cp_comm=kind)
        for tp, pp in product(sizes, sizes):
            room = ranks // (tp * pp * (cp or 1))
            for dp in range(1, room + 1) if nodes == 1 else [room] * min(1, room):
                yield replace(base, tp=tp, pp=pp, dp=dp)
