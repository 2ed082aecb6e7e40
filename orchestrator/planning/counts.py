"""Counts: what one rank of each pipeline stage holds and computes, in parameters."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from orchestrator.planning.goals import GOALS, Goal
from parallel import names
from parallel.capabilities import Proposal
from parallel.galore_spec import GaloreSpec
from parallel.selection import weight_shapes
from parallel.specs import ModelSpec
from parallel.stages import stage_layers


@dataclass(frozen=True)
class TunerExtras:
    """``magnitudes``: a length for each adapted row (DoRA). ``fixed_halves``: a second, fixed A and B (PiSSA).

    ``chosen``: names of weights that full tuning leaves as they are, or that learn whole beside an adapter. ``galore``:
    the layers' linears have projected moments.
    """

    magnitudes: bool = False
    fixed_halves: bool = False
    chosen: frozenset[str] = frozenset()
    galore: GaloreSpec | None = None


@dataclass(frozen=True)
class Workload:
    """One layout of one job: all that memory and time depend on.

    Args:
        stages: layer indices per chunk, as ``parallel.stages.split_layers`` returns them.
        row_tokens: tokens of the longest sequence, padding included.
        adapted: paths of the linears with an adapter (empty when all weights are trained).
        adapter_rank: LoRA's ``r``.
        extras: what the tuner adds to plain LoRA, or takes from full tuning.
        goal: what the objective needs beside the model that learns.
    """

    model: ModelSpec
    proposal: Proposal
    stages: tuple[tuple[int, ...], ...]
    row_tokens: int
    adapted: frozenset[str]
    adapter_rank: int
    device: str
    extras: TunerExtras = TunerExtras()
    goal: Goal = GOALS["sft"]

    @property
    def micro_tokens(self) -> int:
        """Tokens of one micro-batch."""
        return self.proposal.micro_sequences * self.goal.row_sequences * self.row_tokens

    @property
    def value_bytes(self) -> int:
        """Bytes of one weight or activation."""
        return 4 if self.proposal.precision == "fp32" else 2


@dataclass(frozen=True)
class StageCounts:
    """Parameters on one rank of a stage. ``matmul``: those that a token is multiplied with, embedding excluded.

    ``expert_trainable``: those of ``trainable`` that belong to experts, which are replicated over other ranks.
    ``expert``: those of ``base`` that belong to experts. ``adapters``: those of ``trainable`` beside ``base``.
    ``linears``: those of the layers' dense linears, which may be quantised. ``chosen``: base weights that full tuning
    freezes, or that learn whole beside an adapter.
    """

    base: int
    trainable: int
    expert_trainable: int
    matmul: int
    layers: int
    linears: int = 0
    expert: int = 0
    adapters: int = 0
    chosen: int = 0


def layer_matmul_parameters(model: ModelSpec, layer: int) -> int:
    """Weights of one whole layer that one token is multiplied with (of the experts, only the chosen ones)."""
    total = 0
    for linear in names.layer_names(model, layer).linears:
        copies = model.experts_per_token if linear.expert else 1
        total += sum(copies * _product(names.shape(role, model)) for role, _ in linear.parts)
    return total


def head_cost_in_layers(model: ModelSpec) -> float:
    """The work of the output head in units of the last layer's, by multiplications per token.

    Example:
        >>> smollm2 = ModelSpec("llama", 30, 576, 9, 3, 64, 1536, 49152, 8192, 1e-5, 1e5, True)
        >>> round(head_cost_in_layers(smollm2), 1)
        8.0
    """
    return model.vocab * model.hidden / layer_matmul_parameters(model, model.layers - 1)


@lru_cache(maxsize=64)
def layers_alike(model: ModelSpec, adapted: frozenset[str]) -> tuple[int, ...]:
    """For each layer the first one that has the same tensors and the same adapters."""
    first: dict[object, int] = {}
    found = []
    for layer in range(model.layers):
        held, prefix = names.layer_names(model, layer), names.layer_prefix(layer)
        paths = [path.format(expert=0) for linear in held.linears for _, path in linear.parts]
        found.append(first.setdefault((held, tuple(prefix + path in adapted for path in paths)), layer))
    return tuple(found)


def stage_counts(work: Workload, stage: int) -> StageCounts:
    """Count the parameters on one rank of pipeline stage ``stage``."""
    model, topology = work.model, work.proposal.topology
    layers = stage_layers(work.stages, topology.pp, stage)
    first, last = stage == 0, stage == topology.pp - 1
    vocabulary = names.padded_vocab(model.vocab, topology.tp) // topology.tp * model.hidden
    tables = int(first) + int(last and not (model.tied_embeddings and first))
    alike = layers_alike(model, work.adapted)
    held = [
        (_layer_counts(model, topology.tp, topology.ep, topology.etp, _adapters(work), layer), count)
        for layer, count in Counter(alike[layer] for layer in layers).items()
    ]
    experts = sum(one.expert * count for one, count in held)
    base = sum(one.base * count for one, count in held) + tables * vocabulary + (model.hidden if last else 0)
    full = work.proposal.tuner == "full"
    adapters = sum(one.trainable * count for one, count in held)
    for module, here in ((names.HEAD_MODULE, last), (names.EMBEDDING_MODULE, first)):
        if here and module in work.adapted:
            rows = vocabulary // model.hidden
            adapters += work.adapter_rank * (model.hidden + rows)
            if work.extras.magnitudes:  # of an embedding one for each column
                adapters += rows if module == names.HEAD_MODULE else model.hidden
    chosen = _chosen_parameters(work, stage)
    return StageCounts(
        base=base,
        trainable=base - chosen if full else adapters + chosen,
        expert_trainable=experts if full else sum(one.expert_trainable * count for one, count in held),
        matmul=sum(one.matmul * count for one, count in held) // topology.tp + (vocabulary if last else 0),
        layers=len(layers),
        expert=experts,
        linears=sum(one.linears * count for one, count in held) // topology.tp,
        adapters=0 if full else adapters,
        chosen=chosen,
    )


@dataclass(frozen=True)
class _Adapters:
    """What of a tuner decides how large the adapters of a layer are."""

    paths: frozenset[str]
    rank: int
    magnitudes: bool


def _adapters(work: Workload) -> _Adapters:
    return _Adapters(work.adapted, work.adapter_rank, work.extras.magnitudes)


@lru_cache(maxsize=4096)
def _layer_counts(model: ModelSpec, tp: int, ep: int, etp: int, adapters: _Adapters, layer: int) -> StageCounts:
    """One layer on one rank; ``matmul`` and ``linears`` are whole, for they are divided once for all layers."""
    experts = _expert_parameters(model, ep, etp, layer)
    dense, sparse = _adapter_parameters(model, tp, ep, etp, adapters, layer)
    return StageCounts(
        base=_layer_parameters(model, tp, layer) + experts,
        trainable=dense + sparse,
        expert_trainable=sparse,
        matmul=layer_matmul_parameters(model, layer),
        layers=1,
        expert=experts,
        linears=sum(_product(shape) for shape in dense_linear_shapes(model, layer)),
    )


def dense_linear_shapes(model: ModelSpec, layer: int) -> list[tuple[int, int]]:
    """``[out, in]`` of the logical linears of one layer that are neither experts nor routers."""
    return [
        names.shape(role, model)
        for linear in names.layer_names(model, layer).linears
        if not linear.expert and not linear.is_router
        for role, _ in linear.parts
    ]


def _product(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]


def _layer_parameters(model: ModelSpec, tp: int, layer: int) -> int:
    """Base weights of one layer on one rank, without experts; what never learns is no weight, as in transformers."""
    held = names.layer_names(model, layer)
    total = sum(names.norm_width(name, model) for _, name in held.norms)
    if model.qkv_bias:
        total += (model.heads + 2 * model.kv_heads) * model.head_dim // tp
    for linear in held.linears:
        if not linear.expert:
            whole = sum(_product(names.shape(role, model)) for role, _ in linear.parts)
            total += whole if linear.cut == "whole" else whole // tp
    return total


def _expert_parameters(model: ModelSpec, ep: int, etp: int, layer: int) -> int:
    """Weights of the experts of one layer on one rank."""
    linears = names.layer_names(model, layer).linears
    parts = [part for linear in linears if linear.expert for part in linear.parts]
    return sum(_product(names.shape(role, model)) for role, _ in parts) * (model.experts // ep) // etp


def _chosen_parameters(work: Workload, stage: int) -> int:
    """Base weights on one rank of a stage that full tuning freezes, or that learn whole beside an adapter."""
    topology, total = work.proposal.topology, 0
    if not work.extras.chosen:
        return 0
    layers = stage_layers(work.stages, topology.pp, stage)
    here = {names.layer_prefix(layer) for layer in layers}
    uncut = {
        f"{names.layer_prefix(layer)}{path}.weight"
        for layer in layers
        for linear in names.layer_names(work.model, layer).linears
        if linear.cut == "whole"
        for _, path in linear.parts
    }
    first, last = stage == 0, stage == topology.pp - 1
    ends = {names.FINAL_NORM: last, names.HEAD: last, names.EMBEDDING: first or (last and work.model.tied_embeddings)}
    for name, shape in weight_shapes(work.model).items():
        prefix = ".".join(name.split(".")[:3]) + "."
        if name not in work.extras.chosen or not (prefix in here or ends.get(name)):
            continue
        size = _product((shape[0], shape[1] if len(shape) > 1 else 1))
        cut = len(shape) > 1 or name.endswith(".bias")
        cuts = topology.ep * topology.etp if ".experts." in name else topology.tp
        total += size // cuts if cut and name not in uncut else size
    return total


def moment_numbers(work: Workload, stage: int) -> int:
    """fp32 numbers that the optimizer of one rank of a stage keeps: two moments of each trained parameter or, of a
    linear that GaLore projects, two of its projection, and the projector."""
    total = 2 * stage_counts(work, stage).trainable
    galore, topology = work.extras.galore, work.proposal.topology
    if galore is None:
        return total
    sizes = (topology.tp, topology.ep, topology.etp)
    layers = stage_layers(work.stages, topology.pp, stage)
    return total - sum(_saved_in_layer(galore, work.model, work.extras.chosen, layer, sizes) for layer in layers)


@lru_cache(maxsize=4096)
def _saved_in_layer(
    galore: GaloreSpec, model: ModelSpec, frozen: frozenset[str], layer: int, sizes: tuple[int, int, int]
) -> int:
    """By how much a layer's projectors and moments are fewer than AdamW's moments, on a rank of tp, ep and etp."""
    tp, ep, etp = sizes
    saved = 0
    for linear in names.linears(model, layer, ep):
        ranks = etp if linear.expert else tp
        cuts = [ranks if linear.cut == cut else 1 for cut in ("column", "row")]
        for role, path in linear.parts:
            if f"{names.layer_prefix(layer)}{path}.weight" not in frozen:
                whole = names.shape(role, model)
                axis, ((side, rank), (_, other)) = galore.axis(whole), galore.shapes(whole)
                side, other = side // cuts[axis], other // cuts[1 - axis]
                saved += 2 * side * other - side * rank - 2 * rank * other
    return saved


def _adapter_parameters(
    model: ModelSpec, tp: int, ep: int, etp: int, adapters: _Adapters, layer: int
) -> tuple[int, int]:
    """LoRA weights of one layer on one rank: of dense linears, and of experts.

    A is ``[r, in]``, B ``[out, r]``: a column-parallel linear cuts B and keeps A whole on every rank, a row-parallel
    one cuts A and keeps B whole. Experts have an adapter each, and are adapted all or none (``names.resolve_targets``).
    """
    dense = sparse = 0
    for linear in names.layer_names(model, layer).linears:
        ranks = etp if linear.expert else tp
        rows, columns = (ranks if linear.cut == cut else 1 for cut in ("column", "row"))
        for role, path in linear.parts:
            if names.layer_prefix(layer) + path.format(expert=0) not in adapters.paths:
                continue
            out, width = names.shape(role, model)
            count = adapters.rank * (width // columns + out // rows) + (out // rows if adapters.magnitudes else 0)
            if linear.expert:
                sparse += count * (model.experts // ep)
            else:
                dense += count
    return dense, sparse
