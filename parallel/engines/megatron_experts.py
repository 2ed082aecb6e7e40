"""What experts need beyond megatron-core's own steps: gradients of halves that etp ranks share, their norm, balance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import all_to_all
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import permute
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from parallel.balancing import Balance, BalancingClock, ChoiceCounts, Positions
from parallel.engine import EngineSpec
from parallel.groups import Groups
from parallel.lora import ExpertTokens
from parallel.provider_experts import Router
from parallel.seeding import DropoutClock
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
            router.balance = Balance(spec.balancing_loss, positions, over, spec.balancing_over)
        if spec.bias_rate:
            router.counts = ChoiceCounts(positions)


@torch.no_grad()
def shift_biases(chunks: Sequence[torch.nn.Module], spec: EngineSpec, groups: Groups, is_good: bool) -> None:
    """Move the biases of all routers by the choices of a good step's global batch, where the run asks for it."""
    rate = spec.bias_rate if is_good else 0.0
    for router in _routers(chunks):
        if router.counts is not None and router.choice_bias is not None:
            router.counts.shift_(router.choice_bias, rate, groups.by_name["tp_dp_cp"])


class NumberedDispatcher(MoEAlltoAllTokenDispatcher):
    """megatron-core's dispatcher, which sends along which token of the run each one is."""

    tokens_per_expert: Any

    def follow(self, tokens: ExpertTokens, numbers: Callable[[int], torch.Tensor]) -> None:
        """Fill ``tokens`` in every forward pass.

        Args:
            numbers: of a row's tokens on this rank, ``[tokens, samples]``, for how many these are.
        """
        self._followed, self._numbers_of = tokens, numbers

    def dispatch_preprocess(self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor) -> Any:
        """Bring tokens, and their numbers, into the order of the experts."""
        dispatched = super().dispatch_preprocess(hidden_states, routing_map, probs)
        numbers = self._numbers_of(hidden_states.shape[0]).to(hidden_states.device).reshape(-1, 1)
        self._numbers = permute(numbers, self.routing_map, num_out_tokens=self.num_out_tokens)[0]
        return dispatched

    def token_dispatch(self, tokens: torch.Tensor, probs: torch.Tensor) -> Any:
        """Send tokens and numbers to the ranks of their experts."""
        dispatched = super().token_dispatch(tokens, probs)
        self._numbers = all_to_all(self.ep_group, self._numbers, self.output_splits, self.input_splits)
        return dispatched

    def dispatch_postprocess(self, tokens: torch.Tensor, probs: torch.Tensor) -> Any:
        """Gather tokens and numbers over etp, expert by expert."""
        counts = self.tokens_per_expert
        with torch.no_grad():
            numbers, _, _ = super().dispatch_postprocess(self._numbers, probs.detach())
        self.tokens_per_expert = counts
        dispatched = super().dispatch_postprocess(tokens, probs)
        self._followed.by_expert = numbers[:, 0].split(dispatched[1].tolist())
        return dispatched


def number_tokens(
    layer: torch.nn.Module, groups: Groups, clock: DropoutClock, sp: bool, process_groups: ProcessGroupCollection
) -> ExpertTokens | None:
    """Let a new layer's dispatcher say which tokens its experts are given; None where it has none."""
    moe: Any = layer.mlp
    if not isinstance(moe, MoELayer):
        return None
    parts, part = (groups.topology.tp, groups.coordinate("tp")) if sp else (1, 0)
    tokens = ExpertTokens()
    moe.token_dispatcher = dispatcher = NumberedDispatcher(
        moe.num_local_experts, moe.local_expert_indices, config=moe.config, pg_collection=process_groups
    )
    dispatcher.follow(tokens, lambda count: clock.numbers(count * parts)[part * count : (part + 1) * count])
    return tokens


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
