"""Causal attention over whole rows: torch's fused kernels where a layer's rules are plain, else tile by tile."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from parallel.attention_blocks import TILES, Block, Rules, Window


def whole_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rules: Rules) -> torch.Tensor:
    """``query [b, heads, s, d]``, ``key`` and ``value [b, groups, s, d]`` to ``[b, heads, s, d]``.

    torch's kernels know no caps, and windows not on every device. In tiles memory grows with the tokens, and work with
    the window.
    """
    rules = rules.over(query.shape[2])
    if not rules.is_plain:
        return _TiledAttention.apply(query, key, value, rules)
    repeat = query.shape[1] // key.shape[1]
    if repeat > 1:
        key, value = (each.repeat_interleave(repeat, dim=1) for each in (key, value))
    return scaled_dot_product_attention(query, key, value, is_causal=True, scale=rules.scale)


def _block(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rules: Rules) -> Block:
    row = torch.arange(query.shape[2])
    window = Window(rules.window, row, row) if rules.window else None
    return Block(query, key, value, True, rules.scale, rules.cap, window)


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rules: Rules) -> torch.Tensor:
        out, lse = TILES.attend(_block(query, key, value, rules))
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.rules = rules
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        found = TILES.gradients(_block(query, key, value, ctx.rules), grads[0], out, lse)
        return *(each.to(query.dtype) for each in found), None
