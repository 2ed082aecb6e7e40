"""Memory: bytes on one rank of each pipeline stage, by owner. An estimate from shapes, meant to be a little high."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from orchestrator.planning.counts import StageCounts, Workload, dense_linear_shapes, stage_counts
from parallel import names

GIB = 2**30
OVERHEAD_BYTES = {"cpu": int(0.6 * GIB), "cuda": int(1.5 * GIB)}
"""Interpreter, torch and communication buffers of one process (on CUDA: context and NCCL too)."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes on each rank of one stage, by owner.

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

    @property
    def total(self) -> int:
        """All owners together."""
        return sum(asdict(self).values())

    @property
    def largest(self) -> str:
        """The owner that holds most."""
        owners = asdict(self)
        return max(owners, key=lambda owner: owners[owner])


def estimate_memory(work: Workload) -> tuple[StageMemory, ...]:
    """Estimate every stage's bytes per rank, first stage first."""
    return tuple(_stage_memory(work, stage) for stage in range(work.proposal.topology.pp))


def _stage_memory(work: Workload, stage: int) -> StageMemory:
    counts = stage_counts(work, stage)
    adapters = 0 if work.proposal.tuner == "full" else counts.trainable * (2 if work.extras.fixed_halves else 1)
    return StageMemory(
        weights=_weight_bytes(work, counts),
        adapters=adapters * work.value_bytes,
        gradients=counts.trainable * 4,
        optimizer=_optimizer_bytes(work, counts),
        activations=_activation_bytes(work, stage, counts.layers),
        logits=_logits_bytes(work) if stage == work.proposal.topology.pp - 1 else 0,
        overhead=OVERHEAD_BYTES[work.device],
    )


def _weight_bytes(work: Workload, counts: StageCounts) -> int:
    """Base weights; of a quantised base 4 bits and a 64th of 8 bits an element, and one linear at a time in full."""
    if work.proposal.quantise is None:
        return counts.base * work.value_bytes
    packed = counts.linears // 2 + counts.linears // 64 + counts.linears // 4096
    largest = max(rows * columns for rows, columns in dense_linear_shapes(work.model, 0))
    unpacked = 2 * largest // work.proposal.topology.tp * 4  # gate|up are one linear; in fp32 on the way
    return (counts.base - counts.linears) * work.value_bytes + packed + unpacked


def _optimizer_bytes(work: Workload, counts: StageCounts) -> int:
    """Adam's two fp32 moments, and fp32 master weights below fp32; cut over the replicas by a distributed optimizer.

    Replicas are dp x cp ranks, of experts those that hold the same ones. Rajbhandari et al. 2020 (ZeRO), section 3.1:
    K = 12 bytes per parameter with master weights, 8 without.
    """
    per_parameter = 8 if work.proposal.precision == "fp32" else 12
    topology = work.proposal.topology
    dense_replicas = topology.dp * topology.cp
    replicas, expert_replicas = (dense_replicas, topology.edp) if work.distributed_optimizer else (1, 1)
    dense = counts.trainable - counts.expert_trainable
    return -(-dense * per_parameter // replicas) - (-counts.expert_trainable * per_parameter // expert_replicas)


def _activation_bytes(work: Workload, stage: int, layers: int) -> int:
    """What the backward pass needs, at the schedule's deepest point.

    Under 1F1B stage ``s`` of ``p`` holds ``min(p - s, m)`` micro-batches, and virtual chunks multiply the first stage's
    by ``1 + (p - 1) / (p v)`` (Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer
    Models", sections 4.2.3 and 5). Full recomputation keeps each layer's input, and one layer's all while it reruns.
    """
    proposal = work.proposal
    pp, virtual = proposal.topology.pp, proposal.vpp or 1
    in_flight = float(min(pp - stage, proposal.micro_batches))
    if virtual > 1:
        in_flight = min(pp * (1 + (pp - 1) / (pp * virtual)), proposal.micro_batches)
    layer = _layer_activation_bytes(work)
    if proposal.recompute == "full":
        return int(in_flight * layers * _residual_bytes(work)) + layer
    return int(in_flight * layers * layer)


def _residual_bytes(work: Workload) -> int:
    """One activation ``[tokens, hidden]`` of a micro-batch on one rank: the input of a layer."""
    topology = work.proposal.topology
    cuts = topology.cp * (topology.tp if work.proposal.sp else 1)
    return work.micro_tokens * work.model.hidden * work.value_bytes // cuts


def _layer_activation_bytes(work: Workload) -> int:
    """One layer's stored activations for one micro-batch on one rank.

    The method of Korthikanti et al. 2022, section 4 (their equations 2 and 4: what lies between the cut linears is
    divided by ``tp``, the rest only under sequence parallelism), with the terms of these models: no dropout masks, no
    stored attention scores (fused attention; so selective recomputation saves nothing here), SwiGLU of three widths
    (GeGLU of four). Per token: inputs and outputs of two norms, and the inputs of two more where a layer has them; q,
    k, v and the attention output; gate, up and their product.
    """
    model, topology = work.model, work.proposal.topology
    heads = (2 * model.heads + 2 * model.kv_heads) * model.attended_dim
    if model.latent is not None:  # of queries and keys the two parts are kept too
        heads += 2 * model.heads * model.attended_dim
    width = (3 if model.activation == "silu" else 4) * model.ffn / topology.tp
    if model.is_moe:  # every chosen expert sees its own copy of the token; the router stores its scores
        width = model.experts_per_token * (3 * model.expert_ffn / topology.etp + 2 * model.hidden) + model.experts
        # under sequence parallelism each tp rank routes its own tokens, and etp ranks gather theirs
        width *= topology.etp / (topology.tp if work.proposal.sp else 1)
        width += 3 * model.shared_ffn / topology.tp
    cut = work.micro_tokens // topology.cp * work.value_bytes * (heads / topology.tp + width)
    return (6 if model.sandwich_norms else 4) * _residual_bytes(work) + int(cut)


def _logits_bytes(work: Workload) -> int:
    """Logits in the model's type, and in fp32 their exponentials and gradient, for one micro-batch."""
    topology = work.proposal.topology
    rows = names.padded_vocab(work.model.vocab, topology.tp) // topology.tp
    return work.micro_tokens // topology.cp * rows * (work.value_bytes + 8)
