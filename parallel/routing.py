"""How DeepSeek's routers choose experts: among groups first, by scores that a bias may shift for the choice only."""

from __future__ import annotations

import torch

from parallel.specs import Routing


def affinities(logits: torch.Tensor, rule: Routing | None) -> torch.Tensor:
    """The scores of experts as shares that sum to 1, fp32 (arXiv:2412.19437, eq. 19); no rule: softmax.

    Example:
        >>> affinities(torch.zeros(1, 4), Routing("sigmoid")).tolist()
        [[0.25, 0.25, 0.25, 0.25]]
    """
    if rule is None or rule.score == "softmax":
        return logits.float().softmax(dim=-1)
    scores = logits.float().sigmoid()
    return scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)


def choose_experts(
    logits: torch.Tensor, count: int, rule: Routing, normalise: bool, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and choice of experts for each token.

    Args:
        logits: ``[tokens, experts]``; count: how many experts see a token.
        normalise: the chosen weights are divided by their sum.
        bias: ``[experts]``, added to the scores for the choice; weights are of the scores alone.
    Returns:
        Weights ``[tokens, experts]`` in fp32, zero where not chosen, and the choice as bools of the same shape.
    Example:
        >>> rule = Routing("sigmoid", groups=2, chosen_groups=1, best_of_group=2, scale=2.0)
        >>> weights, chosen = choose_experts(torch.tensor([[5.0, -9.0, 0.0, 1.0]]), 1, rule, normalise=True)
        >>> chosen.tolist(), weights.tolist()  # the expert with the largest logit is in the worse group
        ([[False, False, False, True]], [[0.0, 0.0, 0.0, 2.0]])
    """
    wide = logits.float()
    scores = wide.sigmoid() if rule.score == "sigmoid" else wide.softmax(dim=-1)
    ranked = scores if bias is None else scores + bias
    if rule.groups > 1:
        ranked = ranked.masked_fill(~_in_chosen_groups(ranked, rule), -torch.inf)
    index = ranked.topk(count, dim=-1).indices
    weights = scores.gather(1, index)
    if normalise:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    whole = torch.zeros_like(scores).scatter(1, index, weights * rule.scale)
    return whole, torch.zeros_like(scores, dtype=torch.bool).scatter(1, index, True)


def _in_chosen_groups(ranked: torch.Tensor, rule: Routing) -> torch.Tensor:
    """Which experts are in the groups whose best add up to most (arXiv:2405.04434, 2.2.2; arXiv:2412.19437, 2.1.2)."""
    members = ranked.unflatten(1, (rule.groups, -1))
    groups = members.topk(rule.best_of_group, dim=-1).values.sum(dim=-1).topk(rule.chosen_groups, dim=-1).indices
    chosen = torch.zeros_like(members[..., 0], dtype=torch.bool).scatter(1, groups, True)
    return chosen[..., None].expand_as(members).flatten(1)
