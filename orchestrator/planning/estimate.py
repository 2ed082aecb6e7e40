"""Estimate: a layout of a job as the setup that memory and time are estimated for; the same model as for any run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from launch.environment import wanted_threads
from orchestrator.planning.counts import StageCounts, Workload, layers_alike, moment_numbers, stage_counts
from orchestrator.planning.devices import Device, device
from orchestrator.planning.kept import (
    Cut,
    Kept,
    StageKept,
    angles,
    embedding_kept,
    finish_kept,
    first_norm,
    layer_input,
    layer_kept,
)
from orchestrator.planning.memory import StageMemory, stage_memory
from orchestrator.planning.profile import measured_device
from orchestrator.planning.projected import projection
from orchestrator.planning.setup import Holding, Setup, Software
from orchestrator.planning.shape import Shape, shape_of
from orchestrator.planning.timing import StepTime, step_time
from parallel import names
from parallel.specs import ClusterSpec, ModelSpec
from parallel.stages import stage_layers

OURS = Software(overlaps=False, loss_elements=1 << 24, wide_adapters=True)
"""This project's own steps: fused attention, blocked logits (``parallel.loss``), reductions after the last
micro-batch, adapters in fp32."""
DEFAULT_KIND = {"cpu": "cpu", "cuda": "H100-80GB"}


def cluster_device(cluster: ClusterSpec) -> Device:
    """The catalogue's entry of a cluster's devices, with what its profile has measured.

    Raises:
        ConfigError: the catalogue has no ``cluster.gpu``, or the profile is of another kind.
    """
    found = device(cluster.gpu or DEFAULT_KIND[cluster.device])
    if not cluster.profile:
        return found
    return measured_device(cluster.profile, cluster.gpus_per_node, found.kind, wanted_threads() or 0)


def setup_of(work: Workload, cluster: ClusterSpec) -> Setup:
    """The setup of a workload on a cluster, with its exact parameters."""
    proposal, topology = work.proposal, work.proposal.topology
    alike, stand_ins, layers = _stages_alike(
        work.model, work.adapted, work.stages, topology.pp, bool(work.extras.chosen)
    )
    held = {stage: _holding(work, stage) for stage, _ in alike}
    cut = _cut(work, cluster)
    alone = _layers_kept(work.model, cut)
    kept = {stage: _stage_kept(work, cut, stage, [(alone[one], n) for one, n in layers[stage]]) for stage, _ in alike}
    return Setup(
        shape=_trained_shape(work.model),
        device=cluster_device(cluster),
        gpus_per_node=cluster.gpus_per_node,
        tokens=work.row_tokens,
        micro=proposal.micro_sequences,
        sequences=proposal.global_sequences,
        tp=topology.tp,
        pp=topology.pp,
        vpp=proposal.vpp or 1,
        cp=topology.cp,
        ep=topology.ep,
        etp=topology.etp,
        dp=topology.dp,
        sp=proposal.sp,
        stages=_stage_sizes(work.stages, topology.pp),
        zero=int(proposal.distributed),
        recompute=proposal.recompute,
        precision=proposal.precision,
        frozen=proposal.tuner != "full",
        adapter_rank=work.adapter_rank if work.adapted else 0,
        adapts_all=_adapts_mlps(work.adapted),
        dora=work.extras.magnitudes,
        quantised=proposal.quantise is not None,
        cp_comm=proposal.cp_comm,
        software=OURS,
        stage_holdings=tuple(held[stage] for stage in stand_ins),
        alike=alike,
        stage_kept=tuple(kept[stage] for stage in stand_ins),
        row_sequences=work.goal.row_sequences,
        has_reference=work.goal.has_reference,
    )


def _cut(work: Workload, cluster: ClusterSpec) -> Cut:
    proposal, topology = work.proposal, work.proposal.topology
    return Cut(
        tp=topology.tp,
        etp=topology.etp,
        ep=topology.ep,
        cp=topology.cp,
        cp_comm=proposal.cp_comm,
        sp=proposal.sp,
        value_bytes=work.value_bytes,
        device=cluster.device,
        is_full=proposal.tuner == "full",
        adapted=work.adapted,
        rank=work.adapter_rank * (2 if work.extras.fixed_halves else 1),
        magnitudes=work.extras.magnitudes,
    )


@lru_cache(maxsize=64)
@lru_cache(maxsize=64)
def _adapts_mlps(adapted: frozenset[str]) -> bool:
    """Whether more than attention is adapted; ``adapted``: paths of linears."""
    return any(".mlp." in path for path in adapted)


def _trained_shape(model: ModelSpec) -> Shape:
    more_kept = 0 if model.activation == "silu" else 1
    return replace(shape_of(model), more_residuals=2 if model.sandwich_norms else 0, more_kept=more_kept)


@lru_cache(maxsize=1024)
def _stage_sizes(stages: tuple[tuple[int, ...], ...], pp: int) -> tuple[int, ...]:
    return tuple(len(stage_layers(stages, pp, stage)) for stage in range(pp))


@lru_cache(maxsize=1024)
def _stages_alike(
    model: ModelSpec, adapted: frozenset[str], stages: tuple[tuple[int, ...], ...], pp: int, chosen: bool
) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...], dict[int, tuple[tuple[int, int], ...]]]:
    """Stages that stand for all that have the same layers, with their number; for each stage the one that does; and the
    layers of those that stand for others, each that is like no other with its number.

    The ends hold more than layers, and weights may be ``chosen`` by name: these stages are like no other.
    """
    alike = layers_alike(model, adapted)
    first: dict[object, int] = {}
    stand_ins, held = [], {}
    for stage in range(pp):
        layers = frozenset(Counter(alike[layer] for layer in stage_layers(stages, pp, stage)).items())
        alone = stage if chosen or stage in (0, pp - 1) else None
        stand_ins.append(first.setdefault((alone, layers), stage))
        held[stand_ins[-1]] = tuple(layers)
    return tuple(sorted(Counter(stand_ins).items())), tuple(stand_ins), held


@lru_cache(maxsize=512)
def _layers_kept(model: ModelSpec, cut: Cut) -> dict[int, dict[str, Kept]]:
    """What each layer keeps that no other is like, by recompute."""
    kinds = ("none", "selective")
    distinct = set(layers_alike(model, cut.adapted))
    return {layer: {kind: layer_kept(model, cut, layer, kind) for kind in kinds} for layer in distinct}


def _stage_kept(work: Workload, cut: Cut, stage: int, held: Sequence[tuple[dict[str, Kept], int]]) -> StageKept:
    """What a stage keeps of a micro-batch that holds so many of these layers.

    Where nothing before the first layer learns, its norm keeps nothing; under recompute what is embedded is made to
    take a gradient (``parallel.engines.megatron_model``).
    """
    model = work.model
    first, last = stage == 0, stage == work.proposal.topology.pp - 1
    learned = work.adapted | {name.removesuffix(".weight") for name in work.extras.chosen}
    is_frozen = first and not cut.is_full and names.EMBEDDING_MODULE not in learned
    start = {"none": first_norm(model, cut) * -1 if is_frozen else Kept(), "selective": Kept()}
    layers = {kind: sum((one[kind] * count for one, count in held), before) for kind, before in start.items()}
    largest = max((one["none"] for one, _ in held), key=lambda one: one.per_token, default=Kept())
    return StageKept(
        layers=layers,
        inputs=layer_input(model, cut) * sum(count for _, count in held) + angles(model),
        largest=largest + layer_input(model, cut) * -1,
        start=embedding_kept(model, cut) if first else Kept(),
        finish=finish_kept(model, cut) if last else Kept(),
    )


def _holding(work: Workload, stage: int) -> Holding:
    counts = stage_counts(work, stage)
    return Holding(
        base=counts.base,
        expert=counts.expert,
        trainable=counts.trainable,
        expert_trainable=counts.expert_trainable,
        adapters=counts.adapters * (2 if work.extras.fixed_halves else 1),
        adapters_trainable=counts.adapters,
        quantised=counts.linears + counts.expert if work.proposal.quantise else 0,
        moments=moment_numbers(work, stage) if work.extras.galore else None,
        reference=_reference(work, counts),
        projection=projection(work, stage),
    )


def _reference(work: Workload, counts: StageCounts) -> int:
    """What of a stage a reference holds again: weights that learn; a frozen base is its own reference."""
    if not work.goal.has_reference:
        return 0
    return counts.base - counts.chosen if work.proposal.tuner == "full" else counts.chosen


def estimate_memory(work: Workload, cluster: ClusterSpec) -> tuple[StageMemory, ...]:
    """Every stage's bytes per rank, first stage first."""
    return stage_memory(setup_of(work, cluster))


def estimate_time(work: Workload, cluster: ClusterSpec) -> StepTime:
    """One optimizer step."""
    return step_time(setup_of(work, cluster))
