"""Memory: bytes on one rank of each pipeline stage, by owner, at the deepest point of a step."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.planning.constants import FITTED, Constants
from orchestrator.planning.kept import Kept
from orchestrator.planning.setup import Holding, Setup

GIB = 2**30
CPU_OVERHEAD_BYTES = int(0.6 * GIB)
"""Interpreter, torch and communication buffers of one process on a CPU."""

DRIVER_BYTES = int(0.6 * GIB)
"""CUDA's context with its kernels, of one process that talks to no other."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes on each rank of one stage, by owner. ``slack``: what an allocator reserves and does not hand out;
    ``overhead``: what a process and its driver hold beside it; ``reference``: a second copy of what learns.

    Example:
        >>> StageMemory(weights=3, adapters=1, gradients=1, optimizer=2, activations=4, logits=0, overhead=1).total
        12
    """

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    overhead: int
    buffers: int = 0
    slack: int = 0
    reference: int = 0

    @property
    def total(self) -> int:
        """All owners together."""
        return int(sum(vars(self).values()))

    @property
    def allocated(self) -> int:
        """What torch's allocator hands out at the peak."""
        return self.total - self.overhead - self.slack

    @property
    def reserved(self) -> int:
        """What torch's allocator takes from the device."""
        return self.total - self.overhead

    @property
    def largest(self) -> str:
        """The owner that holds most."""
        owners = vars(self)
        return max(owners, key=lambda owner: owners[owner])


def stage_memory(setup: Setup, constants: Constants = FITTED) -> tuple[StageMemory, ...]:
    """Estimate every stage's bytes per rank, first stage first."""
    return tuple(_one_stage(setup, stage, constants) for stage in range(setup.pp))


def fullest(setup: Setup, constants: Constants = FITTED) -> tuple[int, StageMemory]:
    """The stage whose ranks need most, and what."""
    stages = [(stage, _one_stage(setup, stage, constants)) for stage, _ in setup.distinct]
    return max(stages, key=lambda one: one[1].total)


def fits(setup: Setup, capacity: float, constants: Constants = FITTED) -> bool:
    """Whether every rank needs at most ``capacity`` bytes."""
    return all(_one_stage(setup, stage, constants).total <= capacity for stage, _ in setup.distinct)


def _one_stage(setup: Setup, stage: int, constants: Constants) -> StageMemory:
    held = setup.holdings[stage]
    owners = {
        "weights": _weight_bytes(setup, held),
        "adapters": int(held.adapters * (4 if setup.software.wide_adapters else setup.value_bytes)),
        "gradients": _gradient_bytes(setup, held),
        "optimizer": _optimizer_bytes(setup, held),
        "activations": _activation_bytes(setup, stage),
        "logits": _logits_bytes(setup) if stage == setup.pp - 1 else 0,
        "buffers": _buffer_bytes(setup, held, stage),
        "reference": _reference_bytes(setup, held, stage),
    }
    if held.projection is not None:  # in the optimizer, when what the backward pass needs is gone
        passing = owners["activations"] + owners["logits"] + owners["buffers"]
        owners["buffers"] += max(0, held.projection.held - passing)
    if setup.device.is_measured:
        return StageMemory(overhead=CPU_OVERHEAD_BYTES, **owners)
    slack = int(sum(owners.values()) * (constants.slack - 1))
    talking = constants.context_gb * 1e9 if setup.ranks > 1 else 0
    return StageMemory(overhead=DRIVER_BYTES + int(talking), slack=slack, **owners)


def _weight_bytes(setup: Setup, held: Holding) -> int:
    """Base weights; of a quantised base 4 bits and a 64th of 8 bits an element, and one linear at a time in full."""
    cut = setup.replicas if setup.zero == 3 else 1
    if not held.quantised:
        return int(held.base * setup.value_bytes / cut)
    packed = held.quantised / 2 + held.quantised / 64 + held.quantised / 4096
    shape = setup.shape
    largest = max(one.parameters for kind in shape.kinds() for one in shape.linears(kind))
    return int((held.base - held.quantised) * setup.value_bytes + packed + largest / setup.tp * 4)


def _reference_bytes(setup: Setup, held: Holding, stage: int) -> int:
    """The weights that a reference holds again, and on the last stage one fp32 log-probability of each token of a
    micro-batch and one of each sequence of the step. Its passes keep nothing, so they need no more than the model's."""
    if not setup.has_reference:
        return 0
    told = 0.0
    if stage == setup.pp - 1:
        told = 4 * (setup.rank_tokens + setup.micro_batches * setup.micro * setup.row_sequences)
    return int(held.reference * setup.value_bytes / (setup.replicas if setup.zero == 3 else 1) + told)


def _gradient_bytes(setup: Setup, held: Holding) -> int:
    """Gradients are summed in fp32, or in the weights' type where a program reduces them so."""
    each = setup.software.summed_bytes + (2 if setup.software.low_gradients else 0)
    return int(held.trainable * each / (setup.replicas if setup.zero >= 2 else 1))


def _optimizer_bytes(setup: Setup, held: Holding) -> int:
    """Adam's two fp32 moments, and fp32 master weights below fp32; cut over the replicas by a distributed optimizer.

    Replicas are dp x cp ranks, of experts those that hold the same ones. Rajbhandari et al. 2020 (ZeRO), section 3.1:
    K = 12 bytes per parameter with master weights, 8 without: adapters that are fp32 are their own. Projected moments
    (GaLore's) are never cut so.
    """
    if setup.offload:
        return 0
    if held.moments is not None:
        return int(4 * held.moments + (0 if setup.precision == "fp32" else 4 * held.trainable))
    master = 0 if setup.precision == "fp32" else 4
    replicas, expert_replicas = 1, 1
    if setup.zero:
        replicas, expert_replicas = setup.shard_ranks or setup.replicas, setup.expert_replicas
    wide = held.adapters_trainable if setup.software.wide_adapters else 0.0
    of_experts = min(wide, held.expert_trainable)  # experts are adapted, or they learn themselves
    dense = (held.trainable - held.expert_trainable) * (8 + master) - (wide - of_experts) * master
    expert = held.expert_trainable * (8 + master) - of_experts * master
    return int(-(-dense // replicas) - (-expert // expert_replicas))


def _buffer_bytes(setup: Setup, held: Holding, stage: int) -> int:
    """The gradients of one layer's activations while it goes backward, and two layers' weights where those are cut."""
    present = [kind for kind, count in setup.kinds_by_stage[stage].items() if count]
    backward = max((layer_activation_bytes(setup, kind) for kind in present), default=0)
    if setup.zero != 3:
        return backward
    return backward + int(2 * held.base / max(1, setup.stages[stage]) * setup.value_bytes)


def _activation_bytes(setup: Setup, stage: int) -> int:
    """What the backward pass needs, at the schedule's deepest point.

    Under 1F1B stage ``s`` of ``p`` holds ``min(p - s, m)`` micro-batches, and virtual chunks multiply the first stage's
    by ``1 + (p - 1) / (p v)`` (Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer
    Models", sections 4.2.3 and 5). Full recomputation keeps each layer's input, and one layer's all while it reruns.
    """
    pp, virtual = setup.pp, setup.vpp
    in_flight = float(min(pp - stage, setup.micro_batches))
    if virtual > 1:
        in_flight = min(pp * (1 + (pp - 1) / (pp * virtual)) - 2 * stage / virtual, setup.micro_batches)
    if setup.stage_kept:
        return _kept_bytes(setup, stage, in_flight)
    kinds = {kind: count for kind, count in setup.kinds_by_stage[stage].items() if count}
    each = {kind: layer_activation_bytes(setup, kind) for kind in kinds}
    if setup.recompute == "full":
        kept = sum(kinds.values()) * residual_bytes(setup)
        return int(in_flight * kept) + max(each.values(), default=0)
    return int(in_flight * sum(count * each[kind] for kind, count in kinds.items()))


def _kept_bytes(setup: Setup, stage: int, in_flight: float) -> int:
    """The same of a program whose tensors are known."""
    kept = setup.stage_kept[stage]
    if setup.recompute == "full":
        waiting, rerun = kept.inputs, kept.largest
    else:
        waiting, rerun = kept.layers[setup.recompute], Kept()
    tokens, positions = setup.rank_tokens, setup.tokens / setup.cp
    waiting = (waiting + kept.start) * in_flight
    return int(max((waiting + more).bytes(tokens, positions) for more in (kept.finish, rerun)))


def residual_bytes(setup: Setup) -> int:
    """One activation ``[tokens, hidden]`` of a micro-batch on one rank: the input of a layer."""
    return int(setup.rank_tokens * setup.shape.hidden * setup.value_bytes // (setup.tp if setup.sp else 1))


def layer_activation_bytes(setup: Setup, kind: str) -> int:
    """One layer's stored activations for one micro-batch on one rank.

    The method of Korthikanti et al. 2022, section 4 (their equations 2 and 4: what lies between the cut linears is
    divided by ``tp``, the rest only under sequence parallelism), with the terms of the model at hand. Per token: inputs
    and outputs of two norms; q, k, v and the attention output; gate, up and their product. Where attention is not
    fused its scores are stored three times in 5 bytes, unless they are computed again.
    """
    shape = setup.shape
    attends, width = kind in ("dense", "moe", "attention"), 0.0
    blocks, plain = 2 if kind in ("dense", "moe") else 1, not setup.software.fused
    wide = shape.kept_widths + plain  # plain operators keep what each step of an activation makes
    if attends:
        width += shape.score_width + shape.value_width + shape.key_value_width
        width += plain * (shape.score_width + shape.key_value_width / 2)  # before and after rotation
    if kind in ("dense", "mlp"):
        width += wide * shape.ffn
    if kind == "state":
        width += 10 * shape.hidden
    cut = setup.rank_tokens * setup.value_bytes * width / setup.tp
    if kind == "moe":  # every chosen expert sees its own copy of the token; the router stores its scores
        copies = shape.experts_per_token * (wide * shape.expert_ffn / setup.etp + 2 * shape.hidden)
        spread = setup.etp / (setup.tp if setup.sp else 1)  # under sp each tp rank routes its own tokens
        shared = wide * shape.shared_ffn / setup.tp
        cut += setup.rank_tokens * setup.value_bytes * ((copies + shape.experts) * spread + shared)
    if attends and not setup.software.fused_attention and setup.recompute != "selective":
        cut += 5 * setup.rank_tokens * setup.tokens * shape.heads / setup.tp
    return ((2 + plain) * blocks + shape.more_residuals) * residual_bytes(setup) + int(cut)


def _logits_bytes(setup: Setup) -> int:
    """Logits of one micro-batch in the model's type and in fp32; or of a block of them, with their gradient."""
    rows = -(-setup.shape.vocab // (128 * setup.tp)) * 128
    elements, block = setup.rank_tokens * rows, setup.software.loss_elements
    if block:
        return int(min(elements, block) * (setup.value_bytes + 8))
    return int(elements * (setup.value_bytes + 4))
