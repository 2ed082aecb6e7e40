"""Advice: what a plan achieves and what limits it, the next best plan, and what fewer GPUs or one change would do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from orchestrator.config.job import JobConfig
from orchestrator.errors import ConfigError
from orchestrator.planning.candidates import Candidate, Question
from orchestrator.planning.estimate import cluster_device
from orchestrator.planning.goals import GOALS
from orchestrator.planning.memory import GIB, StageMemory
from orchestrator.planning.plan import Plan, ask
from orchestrator.planning.search import Found, search
from orchestrator.planning.shape import Shape, shape_of
from orchestrator.planning.timing import StepTime
from parallel.specs import ClusterSpec, ModelSpec

CALIBRATED_ERROR, UNCALIBRATED_ERROR = 0.13, 0.25
"""Mean error of step time on published runs whose group was left out of the fit (docs/planner.md); twice that for kinds
of devices without a published run, which nothing has checked."""
LIMITS = {
    "matrix products and attention": ("matmul_s", "attention_s", "head_s", "recompute_s", "reference_s"),
    "memory bandwidth": ("memory_s", "optimizer_s"),
    "links between ranks": ("tensor_s", "context_s", "expert_s", "pipeline_s", "data_s"),
    "the pipeline bubble": ("bubble_s",),
    "the host's launches": ("launch_s",),
    "cores that ranks share": ("shared_s",),
}


@dataclass(frozen=True)
class Alternative:
    """Another plan in short. ``typed``: what to type for it."""

    topology: str
    typed: str
    step_time: StepTime
    memory: tuple[StageMemory, ...]
    ranks: int


@dataclass(frozen=True)
class Advice:
    """What a plan achieves: tokens per second and rank, and the share of the device's peak (0: a CPU has none).

    ``error``: relative, of the estimated step (0: not known). ``limit``: where most of the step goes, and how much.
    ``layouts``: how many were considered. ``next_best``, ``fewest`` (ranks that work) and ``faster`` (by one change of
    what the job fixes): None where there is none.
    """

    tokens_per_s_per_rank: float
    utilisation: float
    error: float
    limit: str
    layouts: int
    next_best: Alternative | None
    fewest: Alternative | None
    faster: Alternative | None


def advise(job: JobConfig, model: ModelSpec, cluster: ClusterSpec, plan: Plan, weighed: Found | None = None) -> Advice:
    """Advice about the plan that :func:`orchestrator.planning.plan.make_plan` made of the same three.

    Args:
        weighed: what was found when the plan was made; searched again where it is not at hand.

    Example:
        >>> from orchestrator.planning.plan import make_plan
        >>> smollm2 = ModelSpec("llama", 30, 576, 9, 3, 64, 1536, 49152, 8192, 1e-5, 1e5, True)
        >>> laptop = ClusterSpec("laptop", 1, 4)
        >>> advise(JobConfig(), smollm2, laptop, make_plan(JobConfig(), smollm2, laptop)).next_best.topology
        'pp=2 dp=2 cp=1 tp=1'
    """
    question = ask(job, model, cluster)
    found = weighed or search(question)
    others = [one for one in found.candidates if one.proposal.topology != plan.topology]
    device, peak = cluster_device(cluster), peak_tokens_per_s(job, model, cluster, plan)
    rows = plan.global_sequences * GOALS[plan.objective].row_sequences
    tokens_per_s = rows * plan.sequence_tokens / plan.step_time.total_s
    return Advice(
        tokens_per_s_per_rank=tokens_per_s / plan.ranks_used,
        utilisation=tokens_per_s / peak if peak else 0.0,
        error=0.0 if device.is_measured else CALIBRATED_ERROR if device.calibrated else UNCALIBRATED_ERROR,
        limit=limit_of(plan.step_time),
        layouts=plan.considered,
        next_best=_alternative(others[0]) if others else None,
        fewest=_fewest(question, plan),
        faster=_faster(question, plan),
    )


def peak_tokens_per_s(job: JobConfig, model: ModelSpec, cluster: ClusterSpec, plan: Plan) -> float:
    """Tokens per second of all ranks together at their devices' peak: what MFU is a share of; 0 for a CPU."""
    device = cluster_device(cluster)
    if device.is_measured:
        return 0.0
    peak = device.peaks[device.precision(plan.precision)] * plan.ranks_used
    goal = GOALS[plan.objective]
    operations = operations_per_token(shape_of(model), plan.sequence_tokens, job.tuner.name != "full")
    if goal.has_reference:
        operations += sum(_forward_operations(shape_of(model), plan.sequence_tokens))
    return peak / operations


def operations_per_token(shape: Shape, sequence: int, frozen: bool) -> float:
    """Operations that the model needs for a token, without recompute: 2 per weight forward, 2 for the gradient of the
    input and, where it learns, 2 for its own; attention over the tokens that are seen.

    Source: Korthikanti et al. 2022 (arXiv:2205.05198), appendix A, with the masked half of attention not counted.

    Example:
        >>> round(operations_per_token(Shape(32, 4096, 32, 8, 128, 14336, 128256), 8192, frozen=False) / 1e9, 1)
        51.5
    """
    products, scores = _forward_operations(shape, sequence)
    return (2 if frozen else 3) * products + 3 * scores


def _forward_operations(shape: Shape, sequence: int) -> tuple[float, float]:
    """Of one token's forward pass: those with weights, and those of attention."""
    weights = float(shape.vocab * shape.hidden)
    for kind, count in shape.kinds().items():
        weights += count * sum(linear.parameters for linear in shape.linears(kind))
        if kind == "moe":
            weights += count * shape.expert_parameters() * shape.experts_per_token / shape.experts
    attending = sum(count for kind, count in shape.kinds().items() if kind in ("dense", "moe", "attention"))
    return 2 * weights, 2 * attending * shape.tokens_seen(sequence) * (shape.score_width + shape.value_width)


def limit_of(time: StepTime) -> str:
    """Where most of a step goes.

    Example:
        >>> limit_of(StepTime(matmul_s=3.0, bubble_s=1.0))
        'matrix products and attention (75 % of the step)'
    """
    shares = {name: sum(getattr(time, cause) for cause in causes) for name, causes in LIMITS.items()}
    most = max(shares, key=lambda name: shares[name])
    return f"{most} ({100 * shares[most] / time.total_s:.0f} % of the step)"


def why(job: JobConfig, model: ModelSpec, cluster: ClusterSpec, plan: Plan, asked: JobConfig) -> list[str]:
    """Another choice (``asked``: the job with it) against the plan: what it would cost, or why it cannot run."""
    found = search(ask(asked, model, cluster))
    if not found.candidates:
        return [f"cannot run: {reason}" for reason in sorted({one.reason for one in found.rejected})]
    other = found.candidates[0]
    if other.proposal.topology == plan.topology and other.time == plan.step_time:
        return [f"it is what the plan has: {plan.topology}"]
    ratio = other.time.total_s / plan.step_time.total_s
    lines = [
        f"at best {other.proposal.topology}: an estimated {other.time.total_s:.3g} s per step against "
        f"{plan.step_time.total_s:.3g} s ({ratio:.2f} times the plan's)"
    ]
    lines += [f"  {line}" for line in differences(plan.step_time, other.time)]
    needs = [max(stage.total for stage in memory) / GIB for memory in (plan.memory, other.memory)]
    return [*lines, f"fullest rank {needs[1]:.1f} GiB against {needs[0]:.1f} GiB"]


def differences(one: StepTime, other: StepTime) -> list[str]:
    """Causes whose seconds differ by more than a hundredth of the first step, the largest difference first."""
    gaps = {cause: getattr(other, cause) - value for cause, value in vars(one).items()}
    told = sorted((cause for cause in gaps if abs(gaps[cause]) > one.total_s / 100), key=lambda name: -abs(gaps[name]))
    return [
        f"{cause.removesuffix('_s'):<10} {getattr(one, cause):8.3g} s -> {getattr(other, cause):.3g} s"
        for cause in told
    ]


def _alternative(candidate: Candidate, typed: str = "") -> Alternative:
    topology = candidate.proposal.topology
    axes = ("tp", "pp", "dp", "cp", *(("ep", "etp") if candidate.setup.shape.experts else ()))
    typed = typed or " ".join(f"topology.{axis}={getattr(topology, axis)}" for axis in axes)
    return Alternative(str(topology), typed, candidate.time, candidate.memory, topology.world_size)


def _fewest(question: Question, plan: Plan) -> Alternative | None:
    """The smallest cluster of the same nodes on which the job runs; the global batch stays."""
    for smaller in _smaller_clusters(question.cluster, plan.ranks_used):
        found = search(replace(question, cluster=smaller)).candidates
        if found:
            return _alternative(found[0], f"cluster.nodes={smaller.nodes} "
                                f"cluster.gpus_per_node={smaller.gpus_per_node}")  # fmt: skip
    return None


def _smaller_clusters(cluster: ClusterSpec, ranks: int) -> Iterator[ClusterSpec]:
    """A part of one node, then 1, 2, 4, ... nodes, with fewer ranks than are used now."""
    for parts in range(1, cluster.gpus_per_node):
        if parts < ranks:
            yield replace(cluster, nodes=1, gpus_per_node=parts)
    nodes = 1
    while nodes * cluster.gpus_per_node < ranks:
        yield replace(cluster, nodes=nodes)
        nodes *= 2


def _faster(question: Question, plan: Plan) -> Alternative | None:
    """The one change of what the job fixes that shortens the step most, by at least a hundredth."""
    found = []
    for typed, changed in _changes(question.job):
        try:
            candidates = search(ask(changed, question.model, question.cluster)).candidates
        except ConfigError:  # a change that the job cannot have at all is no advice
            continue
        if candidates:
            found.append(_alternative(candidates[0], typed))
    best = min(found, key=lambda one: one.step_time.total_s, default=None)
    return best if best and best.step_time.total_s < 0.99 * plan.step_time.total_s else None


def _changes(job: JobConfig) -> Iterator[tuple[str, JobConfig]]:
    """Settings that change no number of a run, each left open by itself, with what to type."""
    if job.memory.recompute:
        yield "memory.recompute=null", replace(job, memory=replace(job.memory, recompute=None))
    if job.batch.micro:
        yield "batch.micro_sequences=null", replace(job, batch=replace(job.batch, micro_sequences=None))
    if job.optimizer.distributed is not None:
        yield "optimizer.distributed=null", replace(job, optimizer=replace(job.optimizer, distributed=None))
    fixed = [key for key, value in vars(job.topology).items() if value is not None]
    for key in fixed:
        yield f"topology.{key}=null", replace(job, topology=replace(job.topology, **{key: None}))
    if len(fixed) > 1:
        yield "topology=auto", replace(job, topology=type(job.topology)())
