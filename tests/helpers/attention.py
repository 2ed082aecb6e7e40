"""Attention as it is defined, and what a rank of a context-parallel group computes, for comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from parallel.attention_blocks import Rules
from parallel.sequence import SequenceCut


@dataclass(frozen=True)
class Case:
    """One attention problem: every rank draws the same whole tensors from the seed."""

    heads: int = 4
    groups: int = 4
    tokens: int = 24
    width: int = 8
    batch: int = 2
    seed: int = 0
    precision: str = "float32"
    cap: float = 0.0
    window: int = 0

    @property
    def rules(self) -> Rules:
        """Scale, cap and window."""
        return Rules(self.width**-0.5, self.cap, self.window)

    def inputs(self) -> list[torch.Tensor]:
        """Whole query, key, value and the gradient of the output: ``[s, b, heads, d]``."""
        generator = torch.Generator().manual_seed(self.seed)
        dtype = getattr(torch, self.precision)
        return [
            torch.randn(self.tokens, self.batch, heads, self.width, generator=generator).mul_(2).to(dtype)
            for heads in (self.heads, self.groups, self.groups, self.heads)
        ]


def plain_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rules: Rules) -> torch.Tensor:
    """``softmax(mask(cap(scale q k^T))) v`` over whole rows ``[s, b, heads, d]``, step by step, in fp64."""
    query, key, value = (each.double().permute(1, 2, 0, 3) for each in (query, key, value))
    key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for each in (key, value))
    scores = query @ key.mT * rules.scale
    if rules.cap:
        scores = rules.cap * torch.tanh(scores / rules.cap)
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    if rules.window:
        hidden |= torch.ones(scores.shape[-2:], dtype=torch.bool).tril(-rules.window)
    return (scores.masked_fill(hidden, -torch.inf).softmax(dim=-1) @ value).permute(2, 0, 1, 3)


def whole_results(case: Case) -> list[torch.Tensor]:
    """Output and the gradients of query, key and value, in one process."""
    *leaves, grad = (each.requires_grad_() for each in case.inputs())
    out = plain_attention(*leaves, case.rules)
    out.backward(grad.double())
    return [out.detach(), *(each.grad for each in leaves)]  # type: ignore[misc]


def attend_on_a_rank(cases: list[Case], kind: str, cp: int) -> list[list[Any]]:
    """What this rank computes of its two chunks of each case: output and gradients as arrays."""
    group = dist.new_group(list(range(cp)))
    return [_attend(case, kind, cp, group) for case in cases]


def _attend(case: Case, kind: str, cp: int, group: Any) -> list[Any]:
    from parallel.context_attention import context_attention

    cut = SequenceCut(cp, dist.get_rank())
    *leaves, grad = (cut.take(each, 0).contiguous() for each in case.inputs())
    for leaf in leaves:
        leaf.requires_grad_()
    out = context_attention((leaves[0], leaves[1], leaves[2]), group, kind, case.rules)
    out.backward(grad)
    return [each.detach().float().numpy() for each in (out, *(leaf.grad for leaf in leaves))]  # type: ignore[union-attr]
