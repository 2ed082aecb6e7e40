"""Setup: one model on one layout of one machine; all that the estimates of time and memory depend on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from orchestrator.planning.devices import Device
from orchestrator.planning.kept import StageKept
from orchestrator.planning.shape import Linear, Shape


@dataclass(frozen=True)
class Software:
    """What a training program does, as it describes itself.

    Args:
        fused_attention: scores are never written to memory (Dao et al. 2022, arXiv:2205.14135).
        overlaps: gradients are reduced, and parameters gathered, behind the computation.
        overlaps_tensor: collectives of tensor parallelism are pipelined with the products beside them.
        gradient_bytes: bytes of a gradient as it is reduced.
        summed_bytes: bytes of a gradient where it is summed over micro-batches.
        loss_elements: logits are made so many at a time (0: all of a micro-batch).
        low_gradients: 16-bit gradients are held beside the fp32 ones.
        fused_loss: logits are never held in fp32.
        sends_once: tokens cross the network once for all experts of a domain (DeepEP, HybridEP).
        operators: that the host launches in a layer's forward pass.
        fused: norms, activations and residuals are one kernel each; else each of their steps reads and writes memory.
        native_attention: its kernels are made for the device at hand (cuDNN, FlashAttention-3), not for the one before.
        scatters_sends: tensor-parallel ranks send a part each to the next stage, and gather it there.
        loops_experts: experts are computed one after the other, in products of their own.
        layer_messages: collectives per layer where weights are sharded.
        broadcasts_shards: after the update every rank's part of the parameters is broadcast for itself, and waited for.
        wide_adapters: adapters are fp32 whatever the model is, and so are their own master weights.
    """

    fused_attention: bool = True
    overlaps: bool = True
    overlaps_tensor: bool = False
    gradient_bytes: int = 4
    summed_bytes: int = 4
    loss_elements: int = 0
    low_gradients: bool = False
    fused_loss: bool = False
    sends_once: bool = False
    layer_messages: int = 1
    broadcasts_shards: bool = False
    operators: int = 60
    fused: bool = True
    native_attention: bool = True
    scatters_sends: bool = True
    loops_experts: bool = False
    wide_adapters: bool = False


@dataclass(frozen=True)
class Projection:
    """GaLore's work on one rank of a stage. ``step``: FLOP in fp32 of every step, to project gradients and updates.

    Every ``every`` steps subspaces are chosen: ``gram``: FLOP in fp64 of Gram matrices; ``eigen``: the cubes of their
    sizes, added up. ``expert_gram``, ``expert_eigen``: those of experts, where they are apart. ``held``: bytes at a
    time, while activations are not held.
    """

    every: int
    step: float
    gram: float
    eigen: float
    held: int
    expert_gram: float = 0.0
    expert_eigen: float = 0.0


@dataclass(frozen=True)
class Holding:
    """Parameters on one rank of a stage. ``expert``: those of ``base`` that belong to experts.

    ``trainable``: those with a gradient, adapters included; ``expert_trainable``: of them those of experts.
    ``adapters``: parameters beside ``base``, fixed ones among them; ``adapters_trainable``: without these.
    ``quantised``: those of ``base`` in 4 bits. ``moments``: numbers that the optimizer keeps beside master weights,
    where these are not Adam's two for each trained parameter. ``projection``: what GaLore does with them.
    ``reference``: parameters of a second, frozen copy.
    """

    base: float
    expert: float
    trainable: float
    expert_trainable: float
    adapters: float = 0.0
    quantised: float = 0.0
    moments: float | None = None
    adapters_trainable: float = 0.0
    reference: float = 0.0
    projection: Projection | None = None


def fast_domain(device: Device, gpus_per_node: int) -> int:
    """Neighbouring ranks that a fast link joins; a node, or a larger domain of the device."""
    return max(gpus_per_node, device.domain) if device.domain > 8 else gpus_per_node


@dataclass(frozen=True)
class Setup:
    """A layout, the batch and what trains.

    Args:
        stages: layers per pipeline stage.
        zero: what is cut over the data-parallel ranks: 0 nothing, 1 optimizer, 2 gradients too, 3 weights too.
        shard_ranks: over how many ranks (0: all replicas).
        frozen: the base learns nothing, so its gradients are not computed; ``adapter_rank`` is LoRA's r.
        offload: master weights and moments lie on the host.
        stage_holdings: exact parameters of each stage, where they are known; empty: from the shape.
        alike: stages that stand for others with the same layers and parameters, and for how many; the first of them,
            which holds most micro-batches. Empty: not known.
        stage_kept: what each stage keeps for the backward pass, where a program's own tensors are known.
        row_sequences: sequences of each of ``micro`` rows; ``has_reference``: a reference computes them too.
    """

    shape: Shape
    device: Device
    gpus_per_node: int
    tokens: int
    micro: int
    sequences: int
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    dp: int = 1
    sp: bool = False
    stages: tuple[int, ...] = (1,)
    zero: int = 0
    shard_ranks: int = 0
    recompute: str = "none"
    precision: str = "bf16"
    frozen: bool = False
    adapter_rank: int = 0
    adapts_all: bool = True
    dora: bool = False
    quantised: bool = False
    offload: bool = False
    cp_comm: str = "ring"
    network_rate: float = 0.0
    software: Software = field(default_factory=Software)
    stage_holdings: tuple[Holding, ...] = ()
    alike: tuple[tuple[int, int], ...] = ()
    stage_kept: tuple[StageKept, ...] = ()
    row_sequences: int = 1
    has_reference: bool = False

    @cached_property
    def distinct(self) -> tuple[tuple[int, int], ...]:
        """Stages that differ, each with how many there are of it."""
        if self.alike or self.stage_holdings:
            return self.alike or tuple((stage, 1) for stage in range(self.pp))
        counts: dict[object, list[int]] = {}
        for stage, kinds in enumerate(self.kinds_by_stage):
            counts.setdefault((stage == 0, stage == self.pp - 1, *kinds.items()), []).append(stage)
        return tuple((stages[0], len(stages)) for stages in counts.values())

    @property
    def micro_batches(self) -> int:
        """Forward passes of a data-parallel rank per optimizer step."""
        return max(1, -(-self.sequences // (self.dp * self.micro)))

    @property
    def rank_tokens(self) -> float:
        """Tokens of a micro-batch on one context-parallel rank."""
        return self.micro * self.row_sequences * self.tokens / self.cp

    @property
    def ranks(self) -> int:
        """All ranks."""
        return self.tp * self.cp * self.dp * self.pp

    @property
    def value_bytes(self) -> int:
        """Bytes of a weight or an activation."""
        return 4 if self.precision == "fp32" else 2

    @property
    def replicas(self) -> int:
        """Ranks that hold the same dense weights."""
        return self.dp * self.cp

    @property
    def expert_replicas(self) -> int:
        """Ranks that hold the same experts."""
        return max(1, self.dp * self.cp * self.tp // (self.ep * self.etp))

    @property
    def domain(self) -> int:
        """Neighbouring ranks that a fast link joins; a node, or a larger domain of the device."""
        return fast_domain(self.device, self.gpus_per_node)

    @cached_property
    def kinds_by_stage(self) -> tuple[dict[str, float], ...]:
        """How many layers of each kind every stage has; those of a hybrid are spread evenly."""
        kinds, total = self.shape.kinds(), sum(self.stages)
        if self.shape.hybrid or not kinds.get("moe"):
            return tuple({kind: count * layers / total for kind, count in kinds.items()} for layers in self.stages)
        left, found = kinds.get("dense", 0), []
        for layers in self.stages:
            dense = min(left, layers)
            left -= dense
            found.append({"dense": float(dense), "moe": float(layers - dense)})
        return tuple(found)

    @cached_property
    def holdings(self) -> tuple[Holding, ...]:
        """Parameters of every stage on one rank."""
        return self.stage_holdings or tuple(self._holdings())

    def _holdings(self) -> Iterator[Holding]:
        shape = self.shape
        table = math.ceil(shape.vocab / (128 * self.tp)) * 128 * shape.hidden
        adapters = {kind: self._adapter_parameters(kind) if self.adapter_rank else 0.0 for kind in shape.kinds()}
        dense_parameters = {kind: shape.dense_parameters(kind, self.tp) for kind in shape.kinds()}
        for stage, kinds in enumerate(self.kinds_by_stage):
            first, last = stage == 0, stage == self.pp - 1
            tables = int(first) + int(last and not (shape.tied and first))
            dense = sum(count * dense_parameters[kind] for kind, count in kinds.items())
            expert = kinds.get("moe", 0.0) * shape.expert_parameters() / (self.ep * self.etp)
            base = dense + expert + tables * table + (shape.positions * shape.hidden if first else 0)
            beside = sum(count * adapters[kind] for kind, count in kinds.items())
            yield Holding(
                base=base,
                expert=expert,
                trainable=beside if self.frozen else base,
                expert_trainable=0.0 if self.frozen else expert,
                adapters=beside,
                adapters_trainable=beside,
                quantised=dense if self.quantised else 0.0,
            )

    def _adapter_parameters(self, kind: str) -> float:
        return sum(
            self.adapter_rank
            * (one.out / (self.tp if one.cut == "column" else 1) + one.width / (self.tp if one.cut == "row" else 1))
            for one in self.adapted(kind)
        )

    def adapted(self, kind: str) -> list[Linear]:
        """The linears of a layer that have an adapter."""
        if not self.adapter_rank:
            return []
        return self.shape.linears(kind) if self.adapts_all else list(self.shape.attention_linears())
