"""What experts need beyond megatron-core's own steps: gradients of halves that etp ranks share, their norm, balance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer

from parallel.balancing import Balance, BalancingClock, ChoiceCounts, Positions
from parallel.engine import EngineSpec
from parallel.groups import Groups
from parallel.provider_experts import Router
from parallel.sequence import SequenceCut


def finalize_with_experts(groups: Groups) -> Callable[..., None]:
    """megatron-core's ``finalize_model_grads``, and then the sum over etp of what asked for it.

    Every etp rank has its share of the gradient of an expert adapter's replicated half (``parallel.lora``). Scaling
    and reducing over data-parallel ranks are linear, so that the order does not matter; etp peers cut their buffers
    alike, so it holds under the distributed optimizer too.
    """
    group = groups.by_name["expt_tp"]

    def finalize(model: list[torch.nn.Module], *arguments: Any, **options: Any) -> None:
        finalize_model_grads(model, *arguments, **options)
        gradients = [
            parameter.main_grad  # type: ignore[attr-defined]
            for chunk in model
            for parameter in chunk.parameters()
            if parameter.requires_grad and getattr(parameter, "sum_over_expert_tp", False)
        ]
        if dist.get_world_size(group) > 1 and gradients:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat, group=group)
            for gradient, total in zip(gradients, flat.split([each.numel() for each in gradients]), strict=True):
                gradient.copy_(total.view_as(gradient))

    return finalize


def balance_routers(chunks: Sequence[torch.nn.Module], spec: EngineSpec, groups: Groups, clock: BalancingClock) -> None:
    """Give every router its balancing loss, and what counts its choices, where the run has them."""
    cut = SequenceCut(groups.topology.cp, groups.coordinate("cp"))
    parts, part = (groups.topology.tp, groups.coordinate("tp")) if spec.sp else (1, 0)
    over = tuple(groups.by_name[axis] for axis, size in (("tp", parts), ("cp", cut.size)) if size > 1)
    positions = Positions(clock, cut, parts, part)
    for router in _routers(chunks):
        if spec.balancing_loss:
            router.balance = Balance(spec.balancing_loss, positions, over)
        if spec.bias_rate:
            router.counts = ChoiceCounts(positions)


@torch.no_grad()
def shift_biases(chunks: Sequence[torch.nn.Module], spec: EngineSpec, groups: Groups) -> None:
    """Move the biases of all routers by the choices of the global batch of a step, where the run asks for it."""
    for router in _routers(chunks):
        if router.counts is not None and router.choice_bias is not None:
            router.counts.shift_(router.choice_bias, spec.bias_rate, groups.by_name["tp_dp_cp"])


def _routers(chunks: Sequence[torch.nn.Module]) -> Iterator[Router]:
    return (module for chunk in chunks for module in chunk.modules() if isinstance(module, Router))


def count_experts_once(optimizer: MegatronOptimizer, groups: Groups) -> None:
    """Let the gradient norm count each expert parameter once.

    megatron-core leaves out what ranks other than the first of the *dense* tp group replicate. Experts are not
    replicated over it: with etp = 1 the tp ranks hold different experts, or norms over different ranks; with ep and
    etp it is the etp group that replicates.
    """
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    for part in parts:
        if any(group["is_expert_parallel"] for group in part.param_groups):
            part.tp_group = groups.by_name["expt_tp"]
