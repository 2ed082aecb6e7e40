"""The plan: what will run, and why. Made before anything starts; every rank reads it as plan.json."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any

from orchestrator.config.job import AUTO, JobConfig
from orchestrator.errors import ConfigError, DataError
from orchestrator.planning.candidates import Candidate, Question, Rejected
from orchestrator.planning.experts import check_experts
from orchestrator.planning.goals import is_built
from orchestrator.planning.memory import GIB, StageMemory
from orchestrator.planning.nearest import nearest_legal
from orchestrator.planning.search import ALIKE, Found, micro_sizes, search
from orchestrator.planning.timing import StagePass, StepTime, choosing_s
from orchestrator.planning.tuning import adapted_linears, beyond_peft, chosen_weights
from parallel.capabilities import Proposal, batch_refusals
from parallel.specs import ClusterSpec, ModelSpec
from parallel.stages import is_even
from parallel.topology import Topology

FEW_CHUNKS = 16
"""Chunks of a pipeline whose layers are listed one by one."""
DEFAULT_PRECISION = {"cpu": "fp32", "cuda": "bf16"}


@dataclass(frozen=True)
class History:
    """What similar runs took, in terms of their own estimates: medians over ``runs``."""

    runs: int
    time: float
    memory: float


@dataclass(frozen=True)
class Plan:
    """A topology, the batch split and the estimates behind them.

    Args:
        vpp: virtual chunks per stage, None for none.
        stages: layer indices per chunk; chunk ``virtual * pp + stage``.
        micro_batches: forward passes per data-parallel rank and optimizer step, of ``micro_sequences`` rows each.
        sequence_tokens: longest row before padding; rows are padded to a multiple of ``length_multiple``.
        memory: estimated bytes on each rank of every stage, by owner.
        reasons: why this plan, in words.
        rejected: all other topologies with the reason against each; a slower one has the time of its best settings.
        cp_comm: how context-parallel ranks see each other's tokens, ring or ulysses.
        distributed: each of the dp x cp ranks keeps its part of the optimizer's state only.
        considered: layouts that were weighed: topologies with their settings.
        passes: estimated seconds of one micro-batch on every stage; empty in a plan.json of before.
        cluster: what the plan is for, as it was named or found; None in a plan of isotrain 0.1.
        history: what similar runs took; None where there is none.
        micro_choices: sizes of a micro-batch that the run may change to; empty: none.
        objective: what is learned; where it is not built, the plan is what it would be.
    """

    topology: Topology
    vpp: int | None
    sp: bool
    stages: tuple[tuple[int, ...], ...]
    device: str
    precision: str
    micro_batches: int
    micro_sequences: int
    global_sequences: int
    sequence_tokens: int
    length_multiple: int
    recompute: str
    engine: str
    ranks_used: int
    ranks_idle: int
    memory: tuple[StageMemory, ...]
    step_time: StepTime
    reasons: tuple[str, ...]
    rejected: tuple[Rejected, ...]
    cp_comm: str = "ring"
    distributed: bool = False
    considered: int = 0
    passes: tuple[StagePass, ...] = ()
    cluster: ClusterSpec | None = None
    history: History | None = None
    micro_choices: tuple[int, ...] = ()
    objective: str = "sft"

    @property
    def empty_micro_batches(self) -> int:
        """Micro-batches of a step that have no rows, where dp does not divide the batch."""
        return self.topology.dp * self.micro_batches - self.global_sequences // self.micro_sequences

    @property
    def expected_step_s(self) -> float:
        """The estimated step, corrected by similar runs where there are any."""
        return self.step_time.total_s * (self.history.time if self.history else 1.0)

    @property
    def expected_bytes(self) -> float:
        """The estimate of the fullest rank, corrected alike."""
        return max(stage.total for stage in self.memory) * (self.history.memory if self.history else 1.0)

    def to_json(self) -> str:
        """The text of plan.json."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read the text of plan.json.

        Raises:
            DataError: it is no plan: cut off, edited by hand, or of another version.
        """
        try:
            value: dict[str, Any] = json.loads(text)
            return cls(
                **{
                    **value,
                    "topology": Topology(**value["topology"]),
                    "stages": tuple(tuple(layers) for layers in value["stages"]),
                    "memory": tuple(StageMemory(**stage) for stage in value["memory"]),
                    "step_time": StepTime(**value["step_time"]),
                    "reasons": tuple(value["reasons"]),
                    "micro_choices": tuple(value.get("micro_choices", ())),
                    "rejected": tuple(Rejected(**one) for one in value["rejected"]),
                    "passes": tuple(StagePass(**one) for one in value.get("passes", ())),
                    "cluster": ClusterSpec(**value["cluster"]) if value.get("cluster") else None,
                    "history": History(**value["history"]) if value.get("history") else None,
                }
            )
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"plan.json is no plan: {error}", "isotrain plan KEY=VALUE ... shows a new one; start in a new run_dir"
            ) from error


def make_plan(job: JobConfig, model: ModelSpec, cluster: ClusterSpec) -> Plan:
    """Choose how a job runs on a cluster.

    What the user fixed is kept. What is open (axes, sp, vpp, cp_comm, micro-batch, recompute, the optimizer's
    sharding) is filled in with every value that makes sense; of those that are legal and fit the memory, the one with
    the shortest estimated step is taken. The global batch is never changed.

    Raises:
        ConfigError: nothing can run; the message says why, and the hint is a change that works.
    """
    return decide(job, model, cluster)[0]


def decide(job: JobConfig, model: ModelSpec, cluster: ClusterSpec) -> tuple[Plan, Found]:
    """:func:`make_plan`, with all that was weighed."""
    question = ask(job, model, cluster)
    found = search(question)
    if not found.candidates:
        raise _refusal(question, found.rejected)
    return _plan(question, found), found


def ask(job: JobConfig, model: ModelSpec, cluster: ClusterSpec) -> Question:
    """What all layouts of a job have in common.

    Raises:
        ConfigError: something that no layout can help.
    """
    _check_values(job, cluster)
    _check_length(job, model)
    check_experts(job, model)
    return Question(
        job=job,
        model=model,
        cluster=cluster,
        precision=job.precision or DEFAULT_PRECISION[cluster.device],
        adapted=adapted_linears(job, model),
        chosen=chosen_weights(job, model),
    )


def _plan(question: Question, found: Found) -> Plan:
    best = found.candidates[0]
    job, proposal, topology = question.job, best.proposal, best.proposal.topology
    return Plan(
        topology=topology,
        vpp=proposal.vpp,
        sp=proposal.sp,
        stages=best.stages,
        device=question.cluster.device,
        precision=proposal.precision,
        micro_batches=proposal.micro_batches,
        micro_sequences=proposal.micro_sequences,
        global_sequences=proposal.global_sequences,
        sequence_tokens=job.batch.sequence_tokens,
        length_multiple=best.length_multiple,
        recompute=proposal.recompute,
        engine=proposal.engine,
        ranks_used=topology.world_size,
        ranks_idle=question.cluster.ranks - topology.world_size,
        memory=best.memory,
        step_time=best.time,
        reasons=tuple(_reasons(question, best, found)),
        rejected=found.rejected,
        cp_comm=proposal.cp_comm,
        distributed=proposal.distributed,
        considered=found.considered,
        passes=best.passes,
        cluster=question.cluster,
        micro_choices=tuple(micro_sizes(proposal)) if job.batch.micro_sequences == AUTO else (),
        objective=job.objective.name,
    )


def _reasons(question: Question, best: Candidate, found: Found) -> list[str]:
    """Why this plan, in words."""
    job, cluster, proposal, topology = question.job, question.cluster, best.proposal, best.proposal.topology
    asked = {key: value for key, value in asdict(job.topology).items() if value is not None}
    reasons = [f"cluster={cluster.name}: {cluster.found}"] if cluster.found else []
    if not is_built(job.objective.name):
        reasons.append(f"objective.name={job.objective.name} is not built: this is what it would be, train refuses it")
    if measured := best.setup.device.measured:
        reasons.append(f"times as {measured.words}")
    if asked:
        reasons.append("asked for: " + " ".join(f"topology.{key}={str(value).lower()}" for key, value in asked.items()))
    topologies = 1 + sum(one.step_s > 0 for one in found.rejected)
    if topologies > 1:
        reasons.append(
            f"{_fastest(question, found)} of {topologies} topologies that run and fit: an estimated "
            f"{best.time.total_s:.3g} s per step "
            f"({best.time.compute_s:.3g} s computing, {best.time.bubble_s:.3g} s pipeline bubble)"
        )
    if "dp" not in asked and cluster.nodes > 1:
        reasons.append(f"dp={topology.dp}: uses all {cluster.ranks} ranks with tp={topology.tp} pp={topology.pp}")
    elif "dp" not in asked and not proposal.empty:
        reasons.append(
            f"dp={topology.dp}: the largest that {cluster.ranks} ranks allow (tp={topology.tp} pp={topology.pp}) and "
            f"that divides {job.batch.global_sequences} sequences"
        )
    if proposal.empty:
        reasons.append(
            f"dp={topology.dp} does not divide {job.batch.global_sequences} sequences: {proposal.empty} of "
            f"{topology.dp * proposal.micro_batches} micro-batches are without rows, and weigh nothing"
        )
    idle = cluster.ranks - topology.world_size
    if idle:
        reasons.append(f"{idle} of {cluster.ranks} ranks stay idle")
    if not is_even(best.stages):
        counts = _layer_counts([len(chunk) for chunk in best.stages])
        reasons.append(f"{question.model.layers} layers as {counts}: the output head counts as work of the last stage")
    if topology.cp > 1:
        reasons.append(
            f"cp={topology.cp} by {proposal.cp_comm}: each rank holds 2 of a row's {2 * topology.cp} chunks, an "
            "early and a late one"
        )
    if best.length_multiple > 1:
        reasons.append(
            f"rows are padded to a multiple of {best.length_multiple} tokens (sequence or context parallelism)"
        )
    if (longer_s := choosing_s(best.setup)) > 0:
        every, guess = job.optimizer.galore.update_steps, "" if best.setup.device.is_measured else ", a guess"
        reasons.append(
            f"optimizer=galore chooses its subspaces every {every} steps, which makes that step about {longer_s:.2g} s "
            f"longer ({longer_s / every:.2g} s per step on average{guess})"
        )
    if words := beyond_peft(job.tuner, question.adapted, question.model):
        reasons.append(f"{words}: PEFT has no place for it, so isotrain export makes it --to merged only")
    if job.precision is None:
        reasons.append(f"precision {question.precision}: the default on {cluster.device}")
    return reasons


def _fastest(question: Question, found: Found) -> str:
    """How the taken topology stands to the others."""
    if all(one.time.total_s >= found.candidates[0].time.total_s for one in found.candidates):
        return "fastest"
    return f"of those within {ALIKE[question.cluster.device] - 1:.0%} of the fastest the one with the fewest stages,"


def _layer_counts(counts: Sequence[int]) -> str:
    """Layers of each chunk; of many chunks those that are equal and neighbours together.

    Example:
        >>> _layer_counts([7, 7, 8, 5]), _layer_counts([1] * 12 + [2] * 7)
        ('7 + 7 + 8 + 5', '12 x 1 + 7 x 2')
    """
    if len(counts) <= FEW_CHUNKS:
        return " + ".join(map(str, counts))
    runs = [(count, len(list(run))) for count, run in groupby(counts)]
    return " + ".join(f"{times} x {count}" for count, times in runs)


def _refusal(question: Question, rejected: Sequence[Rejected]) -> ConfigError:
    """The error when nothing can run: what came nearest, and a change that works."""
    hungry = [refused for refused in rejected if refused.needs_bytes]
    if not hungry:
        first = rejected[0]
        hints = [nearest_legal(question) or first.hint, _more_ranks(question)]
        return ConfigError(first.reason, "  or  ".join(hint for hint in hints if hint))
    smallest = min(hungry, key=lambda refused: refused.needs_bytes)
    hint = nearest_legal(question) or _memory_hint(question)
    message = f"no topology fits the memory; the smallest is {smallest.topology}: {smallest.reason}"
    return ConfigError(message, hint or f"cluster.memory_gib={-(-smallest.needs_bytes // GIB)}")


def _more_ranks(question: Question) -> str:
    """On one machine without a GPU ranks are processes: the change that starts as many as were asked for."""
    asked, cluster = question.job.topology, question.cluster
    wanted = math.prod(getattr(asked, axis) or 1 for axis in ("pp", "dp", "cp", "tp"))
    if cluster.device != "cpu" or cluster.nodes > 1 or wanted <= cluster.ranks:
        return ""
    more = replace(question, cluster=replace(cluster, gpus_per_node=wanted))
    return f"cluster.gpus_per_node={wanted}" if search(more).candidates else ""


def _memory_hint(question: Question) -> str:
    """The first saving that makes a plan fit; empty when none does alone."""
    job = question.job
    savings = {
        "batch.micro_sequences=1": replace(job, batch=replace(job.batch, micro_sequences=1)),
        "optimizer.distributed=true": replace(job, optimizer=replace(job.optimizer, distributed=True)),
        "memory.recompute=full": replace(job, memory=replace(job.memory, recompute="full")),
    }
    if job.topology.cp in (None, 1):
        more = range(2, question.cluster.ranks + 1)
        savings |= {f"topology.cp={cp}": replace(job, topology=replace(job.topology, cp=cp)) for cp in more}
    for typed, thriftier in savings.items():
        other = replace(question, job=thriftier)
        if search(other).candidates:
            return typed
    return ""


def _check_length(job: JobConfig, model: ModelSpec) -> None:
    tokens, positions = job.batch.sequence_tokens, model.max_positions
    if tokens > positions:
        raise ConfigError(
            f"batch.sequence_tokens={tokens} is more than the model's {positions} positions (max_position_embeddings)",
            f"batch.sequence_tokens={positions}",
        )


def _check_values(job: JobConfig, cluster: ClusterSpec) -> None:
    """Refuse what no topology can help: what is no size at all, and a batch that micro-batches do not divide."""
    if cluster.device not in DEFAULT_PRECISION:
        known = ", ".join(DEFAULT_PRECISION)
        raise ConfigError(f"cluster.device={cluster.device} is unknown; there is {known}", "cluster.device=cpu")
    sizes: dict[str, int | None] = {
        "cluster.nodes": cluster.nodes,
        "cluster.gpus_per_node": cluster.gpus_per_node,
        "batch.global_sequences": job.batch.global_sequences,
        "batch.micro_sequences": job.batch.micro,
        "batch.sequence_tokens": job.batch.sequence_tokens,
        "tuner.r": job.tuner.r,
    }
    sizes |= {f"topology.{key}": value for key, value in asdict(job.topology).items() if key not in ("sp", "cp_comm")}
    for key, value in sizes.items():
        if value is not None and value < 1:
            raise ConfigError(f"{key}={value} is no positive whole number", f"{key}=1")
    micro = job.batch.micro or 1
    batch = Proposal(Topology(), global_sequences=job.batch.global_sequences, micro_sequences=micro)
    for refusal in batch_refusals(batch):
        raise ConfigError(refusal.message, refusal.hint)
