"""Timing: one optimizer step by cause. Formulas cite their source; docs/planner.md says how well they hold."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from orchestrator.planning.compute import END_OPERATORS, Computing, LayerWork, Work
from orchestrator.planning.constants import FITTED, Constants, constants_for
from orchestrator.planning.links import Links
from orchestrator.planning.setup import Setup
from orchestrator.planning.talking import layer_talk

UPDATE_BYTES = 34
"""Moved for each updated parameter: fp32 master and two moments read and written, the gradient read twice (its norm
first), and the 16-bit weight written."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step by cause; of collectives what does not hide behind computation.

    ``matmul_s``, ``attention_s``, ``memory_s`` (norms, activations, casts), ``launch_s``: of the slowest stage.
    ``recompute_s``: what it computes twice. ``head_s``: output layer and loss, where they are on it. ``tensor_s``,
    ``context_s``, ``expert_s``: collectives inside of its layers. ``data_s``: gradients and sharded parameters.
    ``shared_s``: cores that other ranks of the machine are on. ``reference_s``: a reference's forward passes, with all
    that ranks tell each other in them.
    """

    matmul_s: float = 0.0
    attention_s: float = 0.0
    memory_s: float = 0.0
    launch_s: float = 0.0
    recompute_s: float = 0.0
    head_s: float = 0.0
    tensor_s: float = 0.0
    context_s: float = 0.0
    expert_s: float = 0.0
    bubble_s: float = 0.0
    pipeline_s: float = 0.0
    data_s: float = 0.0
    optimizer_s: float = 0.0
    shared_s: float = 0.0
    reference_s: float = 0.0

    @property
    def compute_s(self) -> float:
        """All that ranks compute, without the optimizer."""
        return self.matmul_s + self.attention_s + self.memory_s + self.launch_s + self.recompute_s + self.head_s

    @property
    def total_s(self) -> float:
        """The step."""
        return float(sum(vars(self).values()))


@dataclass(frozen=True)
class _Stage:
    """One micro-batch of one stage, forward and backward. ``forward``: seconds of ``work`` that are forward."""

    work: Work
    forward: float
    launch: float
    again: float
    ends: float
    tensor: float
    context: float
    expert: float

    @property
    def total(self) -> float:
        return self.work.total + self.launch + self.again + self.ends + self.tensor + self.context + self.expert


@dataclass(frozen=True)
class StagePass:
    """Seconds that a stage needs for one micro-batch, over all of its virtual chunks."""

    forward_s: float
    backward_s: float


@dataclass(frozen=True)
class LayerCosts:
    """One micro-batch of a layer of each kind, what ranks tell each other in it (over tp, cp and ep), and of both ends.

    All stages share them, and all layouts that differ in pp, vpp, dp and the optimizer only. ``reference``: seconds of
    a reference's layers by kind, forward and talk included, and of its embedding and its head; empty: there is none.
    ``ends_host_s``: what the host needs to launch both ends, where it is the device.
    """

    layers: dict[str, LayerWork]
    talks: dict[str, tuple[float, float, float]]
    head: Work
    embedding: Work
    reference: dict[str, float] = field(default_factory=dict)
    ends_host_s: float = 0.0


def layer_costs(setup: Setup, constants: Constants = FITTED) -> LayerCosts:
    """The costs of a setup's layers."""
    constants = _constants(setup, constants)
    computing, links = Computing(setup, constants), Links(setup, constants)
    layers = {kind: computing.layer(kind) for kind, count in setup.shape.kinds().items() if count}
    talks = {kind: layer_talk(setup, links, constants, kind, layers[kind].forward.attention) for kind in layers}
    ends_host_s = 2 * END_OPERATORS * constants.launch_s if setup.device.is_measured else 0.0
    return LayerCosts(layers, talks, *computing.ends(), _reference_costs(setup, constants), ends_host_s)


def _reference_costs(setup: Setup, constants: Constants) -> dict[str, float]:
    """A micro-batch's forward pass through the model without adapters: a layer of each kind, and both ends."""
    if not setup.has_reference:
        return {}
    plain = replace(setup, adapter_rank=0, recompute="none")
    computing, links = Computing(plain, constants), Links(plain, constants)
    found = {}
    for kind in (kind for kind, count in setup.shape.kinds().items() if count):
        layer = computing.layer(kind)
        busy = layer.forward.total + sum(layer_talk(plain, links, constants, kind, layer.forward.attention, True))
        found[kind] = busy + layer.host_s / 2 if setup.device.is_measured else max(busy, layer.host_s / 2)
    head, embedding = computing.ends(forward_only=True)
    return found | {"head": head.total, "embedding": embedding.total}


def step_time(setup: Setup, constants: Constants = FITTED, costs: LayerCosts | None = None) -> StepTime:
    """Estimate one optimizer step; ``costs``: its layers', where they are known.

    The slowest stage sets the pace; the other stages' micro-batch is added once, divided by the virtual chunks
    (Narayanan et al. 2021, arXiv:2104.04473, section 2.2: a bubble of ``(pp - 1) / vpp`` micro-batches).
    """
    constants = _constants(setup, constants)
    costs = costs or layer_costs(setup, constants)
    stages = [(_stage(setup, costs, stage), count) for stage, count in setup.distinct]
    slowest = max((stage for stage, _ in stages), key=lambda stage: stage.total)
    passes = setup.micro_batches
    others = sum(stage.total * count for stage, count in stages) - slowest.total
    computing = passes * (slowest.work.total + slowest.launch + slowest.again + slowest.ends)
    time = StepTime(
        matmul_s=passes * slowest.work.matmul,
        attention_s=passes * slowest.work.attention,
        memory_s=passes * slowest.work.memory,
        launch_s=passes * slowest.launch,
        recompute_s=passes * slowest.again,
        head_s=passes * slowest.ends,
        tensor_s=passes * slowest.tensor,
        context_s=passes * slowest.context,
        expert_s=passes * slowest.expert,
        bubble_s=max(0.0, others) / setup.vpp,
        pipeline_s=_pipeline_s(setup, constants),
        data_s=_data_s(setup, constants, computing),
        optimizer_s=_optimizer_s(setup, constants),
    )
    busy = passes * sum((stage.work.total + stage.launch + stage.again + stage.ends) * count for stage, count in stages)
    if setup.has_reference:
        reference = [(_reference_stage(setup, costs, stage), count) for stage, count in setup.distinct]
        paced, whole = max(one for one, _ in reference), sum(one * count for one, count in reference)
        alone = passes * paced + (whole - paced) / setup.vpp + time.pipeline_s / 2  # sends go one way only
        time, busy = replace(time, reference_s=alone), busy + passes * whole
    talk = passes * sum((stage.tensor + stage.context + stage.expert) * count for stage, count in stages)
    return replace(time, shared_s=_shared_s(setup, busy, talk, time))


def _constants(setup: Setup, constants: Constants) -> Constants:
    measured = setup.device.measured
    if measured is None:
        return constants_for(setup.device.is_measured, constants)
    return constants_for(setup.device.is_measured, constants, measured.attention, measured.launch_s)


def _shared_s(setup: Setup, busy_s: float, talk_s: float, time: StepTime) -> float:
    """What ranks that share a machine's cores wait for them.

    Ranks that cut a layer between them compute at the same time, and then tell each other: each such stretch takes as
    much longer as they are more than the cores. And all that all ranks compute, and copy to each other, takes all cores
    at least so long; where ranks wait for others anyway (a pipeline's bubble) their cores compute for others meanwhile.

    Args:
        busy_s, talk_s: what one rank of every stage computes, and waits for in collectives inside of layers, together.
    """
    measured = setup.device.measured
    if measured is None or not measured.cores:
        return 0.0
    cores, together = measured.cores / measured.threads, setup.tp * setup.cp
    ranks = together * setup.dp
    least_s = (busy_s + setup.pp * time.optimizer_s) * ranks / cores + talk_s * ranks / max(together, cores)
    crowded_s = (time.compute_s + time.bubble_s + time.reference_s) * max(0.0, together / cores - 1)
    return max(crowded_s, least_s - time.total_s, 0.0)


def stage_passes(setup: Setup, constants: Constants = FITTED, costs: LayerCosts | None = None) -> tuple[StagePass, ...]:
    """What every stage needs for a micro-batch, first stage first; the largest is what :func:`step_time` goes by.

    Launches, collectives, embedding and head are dealt to forward and backward as the layers' work is.
    """
    costs = costs or layer_costs(setup, constants)
    passes = []
    for stage in (_stage(setup, costs, stage) for stage in range(setup.pp)):
        forward = stage.total * (stage.forward / max(stage.work.total + stage.again, 1e-30))
        passes.append(StagePass(forward, stage.total - forward))
    return tuple(passes)


def _stage(setup: Setup, costs: LayerCosts, stage: int) -> _Stage:
    work, forward, again, launch = Work(), 0.0, 0.0, 0.0
    tensor = context = expert = 0.0
    for kind, count in setup.kinds_by_stage[stage].items():
        if not count:
            continue
        layer, talk = costs.layers[kind], costs.talks[kind]
        work += (layer.forward + layer.backward) * count
        forward += layer.forward.total * count
        again += layer.again.total * count
        busy = layer.forward.total + layer.backward.total + layer.again.total + sum(talk)
        launch += (layer.host_s if setup.device.is_measured else max(0.0, layer.host_s - busy)) * count
        tensor, context, expert = tensor + talk[0] * count, context + talk[1] * count, expert + talk[2] * count
    ends = (costs.embedding.total if stage == 0 else 0.0) + (costs.head.total if stage == setup.pp - 1 else 0.0)
    if stage == setup.pp - 1:
        launch += costs.ends_host_s
    return _Stage(work, forward, launch, again, ends, tensor, context, expert)


def _reference_stage(setup: Setup, costs: LayerCosts, stage: int) -> float:
    """Seconds of a reference's micro-batch on a stage."""
    found = sum(costs.reference[kind] * count for kind, count in setup.kinds_by_stage[stage].items() if count)
    found += costs.reference["embedding"] if stage == 0 else 0.0
    return found + (costs.reference["head"] if stage == setup.pp - 1 else 0.0)


def _pipeline_s(setup: Setup, constants: Constants) -> float:
    """One send forward and one backward of every micro-batch's hidden states, for each virtual chunk."""
    if setup.pp == 1:
        return 0.0
    links = Links(setup, constants)
    size = setup.rank_tokens * setup.shape.hidden * setup.value_bytes
    if setup.sp or setup.software.scatters_sends:
        size /= setup.tp
    one = 2 * links.send_s(size, setup.tp * setup.cp * setup.dp)
    passes = setup.micro_batches * setup.vpp + setup.pp - 1
    shown = 1 - constants.hidden if setup.vpp > 1 else 1.0  # the interleaved schedule sends while it computes
    return passes * one * shown


def _data_s(setup: Setup, constants: Constants, computing_s: float) -> float:
    """Gradients reduced and sharded parameters gathered, once a step; with sharded weights in every micro-batch."""
    links = Links(setup, constants)
    most = max((setup.holdings[stage] for stage, _ in setup.distinct), key=lambda one: one.trainable)
    size = setup.software.gradient_bytes
    dense, expert = most.trainable - most.expert_trainable, most.expert_trainable
    if setup.zero == 3:
        whole = max(one.base for one in setup.holdings)
        gathered = links.gather_s(whole * setup.value_bytes, setup.replicas, setup.tp)
        scattered = links.gather_s(most.trainable * size, setup.replicas, setup.tp)
        each = setup.software.layer_messages + (3 * setup.shape.experts if setup.software.loops_experts else 0)
        messages = 3 * (each * max(setup.stages) - 1)
        talk = setup.micro_batches * (2 * gathered + scattered + messages * links.hops_s(setup.replicas, setup.tp))
        return (
            max(talk - constants.hidden * computing_s, talk * (1 - constants.hidden))
            if setup.software.overlaps
            else talk
        )
    scatter = links.gather_s(dense * size, setup.replicas, setup.tp)
    scatter += links.gather_s(expert * size, setup.expert_replicas, setup.etp * setup.ep)
    gather = links.gather_s(dense * (setup.value_bytes if setup.zero else size), setup.replicas, setup.tp)
    gather += links.gather_s(
        expert * (setup.value_bytes if setup.zero else size), setup.expert_replicas, setup.etp * setup.ep
    )
    if setup.zero and 0 < setup.shard_ranks < setup.replicas:
        gather = links.gather_s(dense * setup.value_bytes, setup.shard_ranks, setup.tp)
        scatter = links.reduce_s(dense * size, setup.replicas, setup.tp)
    if setup.zero == 2:
        scatter *= setup.micro_batches
    waited = 0.0
    if setup.zero and setup.software.broadcasts_shards:
        shards = setup.shard_ranks or setup.replicas
        waited, gather = gather + shards * links.tree_s(shards, setup.tp), 0.0
    talk = scatter + gather
    if not setup.software.overlaps:
        return talk + waited
    behind = computing_s / setup.micro_batches * constants.hidden * (setup.micro_batches if setup.zero == 2 else 1)
    return max(talk - behind, talk * (1 - constants.hidden)) + waited


def _optimizer_s(setup: Setup, constants: Constants) -> float:
    """Adam on the parameters that a rank updates, limited by memory."""
    most = max((setup.holdings[stage] for stage, _ in setup.distinct), key=lambda one: one.trainable)
    dense, expert = most.trainable - most.expert_trainable, most.expert_trainable
    if setup.zero:
        dense /= setup.shard_ranks or setup.replicas
        expert /= setup.expert_replicas
    zeroed = most.trainable * GRADIENT_PASSES if setup.zero < 2 else 0.0
    adam = ((dense + expert) * UPDATE_BYTES + zeroed) / (setup.device.memory_rate * constants.memory)
    return adam + _projecting_s(setup, constants)


def _projecting_s(setup: Setup, constants: Constants) -> float:
    """GaLore's products of every step, and its share of the decompositions, which come every so many steps."""
    held = [one.projection for one in setup.holdings if one.projection is not None]
    if not held:
        return 0.0
    products = max(one.step for one in held) / (setup.device.matmul_rate("fp32") * constants.matmul)
    return products + choosing_s(setup, constants) / held[0].every


def choosing_s(setup: Setup, constants: Constants = FITTED) -> float:
    """What a step takes longer in which GaLore chooses its subspaces; 0 without GaLore."""
    constants = _constants(setup, constants)
    rate = setup.device.matmul_rate("fp32") * constants.matmul
    eigen = EIGEN_ON_CPU if setup.device.is_measured else EIGEN_GUESSED
    held = [one.projection for one in setup.holdings if one.projection is not None]
    return max(((GRAM * one.gram + eigen * one.eigen) / rate for one in held), default=0.0)


GRAM = 5.0
"""Rate of products in fp32 / in fp64, measured on a CPU (107 and 19 GFLOP/s on a core)."""
EIGEN_ON_CPU = 90.0
"""All eigenvectors in fp64 as so many times n^3 FLOP at the rate of fp32 products: on a core 125 at n=256, 106 at 576,
117 at 1024, 58 at 2048."""
EIGEN_GUESSED = 900.0
"""The same of an accelerator: a guess, nobody measured; they do this at a much smaller share of their rate."""

GRADIENT_PASSES = 12
"""Bytes per parameter of gradients that are zeroed, checked and measured whole on every rank."""
