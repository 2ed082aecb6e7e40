"""Routing is that of transformers' routers: their weight is the identity here, so that they are fed with logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from parallel.routing import affinities, choose_experts
from parallel.specs import Routing

EXPERTS, COUNT = 8, 3


def theirs(kind: str, bias: torch.Tensor, **changes: Any) -> Any:
    from transformers import AutoConfig
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    sizes = {"hidden_size": EXPERTS, "num_attention_heads": 2, "n_routed_experts": EXPERTS}
    config = AutoConfig.for_model(kind, **sizes, num_experts_per_tok=COUNT, routed_scaling_factor=1.5, **changes)
    router = (DeepseekV2TopkRouter if kind == "deepseek_v2" else DeepseekV3TopkRouter)(config)
    router.weight.data.copy_(torch.eye(EXPERTS))
    if kind == "deepseek_v3":
        router.e_score_correction_bias.copy_(bias)
    return router


@pytest.mark.parametrize(
    ("kind", "changes", "rule"),
    [
        ("deepseek_v2", {}, Routing("softmax", scale=1.5)),
        (
            "deepseek_v2",
            {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
            Routing("softmax", 4, 2, scale=1.5),
        ),
        ("deepseek_v3", {"n_group": 4, "topk_group": 2}, Routing("sigmoid", 4, 2, 2, bias=True, scale=1.5)),
        ("deepseek_v3", {"n_group": 2, "topk_group": 1}, Routing("sigmoid", 2, 1, 2, bias=True, scale=1.5)),
        (
            "deepseek_v3",
            {"n_group": 1, "topk_group": 1, "norm_topk_prob": False},
            Routing("sigmoid", best_of_group=2, bias=True, scale=1.5),
        ),
    ],
)
def test_weights_and_choice_are_those_of_transformers(kind: str, changes: dict[str, Any], rule: Routing) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(500, EXPERTS, generator=generator)
    bias = torch.randn(EXPERTS, generator=generator) * 0.3
    with torch.no_grad():
        _, weights, index = theirs(kind, bias, **changes)(logits)
    expected = torch.zeros_like(logits).scatter(1, index, weights)
    normalise = kind == "deepseek_v3" and changes.get("norm_topk_prob", True)
    found, chosen = choose_experts(logits, COUNT, rule, normalise, bias if rule.bias else None)
    torch.testing.assert_close(found, expected)
    assert torch.equal(chosen, expected > 0) and (chosen.sum(dim=1) == COUNT).all()
    if rule.bias:
        assert not torch.equal(choose_experts(logits, COUNT, rule, normalise)[1], chosen)


def test_affinities_are_shares() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0]])
    shares = logits.sigmoid() / logits.sigmoid().sum()
    torch.testing.assert_close(affinities(logits, Routing("sigmoid")), shares)
    torch.testing.assert_close(affinities(logits, None), logits.softmax(dim=-1))
