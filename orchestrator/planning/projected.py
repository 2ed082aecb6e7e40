"""Projected: what GaLore (``parallel.engines.megatron_galore``) computes and holds beside AdamW."""

from __future__ import annotations

from functools import lru_cache

from orchestrator.planning.counts import Workload
from orchestrator.planning.setup import Projection
from parallel import names
from parallel.galore_spec import GaloreSpec
from parallel.specs import ModelSpec
from parallel.stages import stage_layers

IN_FP64 = 1024  # columns of a matrix that are in fp64 at a time
SQUARES = 5  # fp64 matrices of the shorter side: the Gram matrix, a copy, eigenvectors, and LAPACK's 2 of workspace


def projection(work: Workload, stage: int) -> Projection | None:
    """GaLore's work on one rank of a stage; None where nothing is projected.

    The ranks that hold the same weights share the decompositions out: tp x dp x cp of them; of experts etp and those
    that hold the same ones.
    """
    galore, topology = work.extras.galore, work.proposal.topology
    if galore is None:
        return None
    sizes = (topology.tp, topology.ep, topology.etp)
    layers = stage_layers(work.stages, topology.pp, stage)
    found = [_layer(galore, work.model, work.extras.chosen, layer, sizes) for layer in layers]
    replicas = topology.dp * topology.cp
    dense, experts = topology.tp * replicas, max(1, topology.tp * replicas // topology.ep)
    return Projection(
        every=galore.update_steps,
        step=sum(one.step for one in found),
        gram=sum(one.gram / dense + one.expert_gram / experts for one in found),
        eigen=sum(one.eigen / dense + one.expert_eigen / experts for one in found),
        held=max((one.held for one in found), default=0),
    )


@lru_cache(maxsize=4096)
def _layer(
    galore: GaloreSpec, model: ModelSpec, frozen: frozenset[str], layer: int, sizes: tuple[int, int, int]
) -> Projection:
    """The same of one layer whose decompositions nobody shares."""
    tp, ep, etp = sizes
    step, held, work = 0.0, 0, {False: [0.0, 0.0], True: [0.0, 0.0]}
    for linear in names.linears(model, layer, ep):
        ranks = (etp if linear.expert else tp) if linear.cut != "whole" else 1
        for role, path in linear.parts:
            if f"{names.layer_prefix(layer)}{path}.weight" in frozen:
                continue
            whole = names.shape(role, model)
            (side, rank), (_, other) = galore.shapes(whole)
            here, short = side * other // ranks, min(whole)
            step += 4.0 * rank * here
            work[linear.expert][0] += 2.0 * short * short * max(whole)
            work[linear.expert][1] += float(short) ** 3
            gathered = 4 * side * other * (3 if ranks > 1 else 1)  # one's own, and another's in parts and joined
            chosen = gathered + 8 * short * (SQUARES * short + min(IN_FP64, max(whole)))
            held = max(held, chosen, 4 * (2 * here + 3 * rank * other))
    (gram, eigen), (expert_gram, expert_eigen) = work[False], work[True]
    return Projection(galore.update_steps, step, gram, eigen, held, expert_gram, expert_eigen)
