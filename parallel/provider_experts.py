"""The router of a mixture of experts: megatron-core's, with room for an adapter and a balancing loss of ours."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import apply_router_token_dropping
from megatron.core.transformer.moe.router import TopKRouter

from parallel.balancing import Balance, ChoiceCounts
from parallel.routing import affinities, choose_experts
from parallel.specs import ModelSpec, Routing


class Router(TopKRouter):
    """Chooses each token's experts.

    ``adapter``, where there is one, changes the logits by what it makes of the tokens. ``balance``, where there is one,
    adds its loss to the run's; megatron-core's own are off, because they depend on the micro-batch and on padding.
    An expert with a capacity drops tokens only after both have seen the choice.
    ``choice_bias`` shifts the choice where the model has one, in fp32 whatever the model's type. No gradient reaches
    it; ``counts``, where there are any, say how it is moved.
    """

    def __init__(self, spec: ModelSpec, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.adapter: torch.nn.Module | None = None
        self.balance: Balance | None = None
        self.counts: ChoiceCounts | None = None
        self.spec = spec
        self.choice_bias: torch.nn.Parameter | None = None
        if spec.routing is not None and spec.routing.bias:
            self.choice_bias = torch.nn.Parameter(torch.zeros(spec.experts), requires_grad=False)

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """``[..., hidden] -> [..., experts]``, in the router's type."""
        logits: torch.Tensor = super().gating(input)
        return logits if self.adapter is None else self.adapter(input, logits).to(logits.dtype)

    def routing(self, logits: torch.Tensor, padding_mask: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Probabilities and choice ``[tokens, experts]`` of logits ``[s, b, experts]``."""
        spec, capacity = self.spec, self.config.moe_expert_capacity_factor
        if spec.routing is None and capacity is None:
            probabilities, chosen = super().routing(logits, padding_mask)
        else:
            rows, rule = logits.flatten(0, 1), spec.routing or Routing("softmax")
            probabilities, chosen = choose_experts(
                rows, spec.experts_per_token, rule, spec.normalise_expert_weights, self.choice_bias
            )
        if self.training and torch.is_grad_enabled():
            if self.counts is not None:
                self.counts.add(chosen, logits.shape[0])
            if self.balance is not None:
                probabilities = self.balance(affinities(logits, spec.routing), chosen, probabilities)
        if capacity is None:
            return probabilities, chosen
        kept: tuple[torch.Tensor, torch.Tensor] = apply_router_token_dropping(
            probabilities, chosen, spec.experts_per_token, capacity
        )
        return kept
