"""Core attention on ``scaled_dot_product_attention``: what runs without transformer-engine, on CPU and on any GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention


class SdpaAttention(torch.nn.Module):
    """Causal attention over right-padded rows, with grouped key/value heads.

    Rows are padded on the right, so that a causal mask alone keeps padding out of every real position.
    Takes ``query [s, b, heads, d]``, ``key`` and ``value [s, b, groups, d]`` of this tensor-parallel rank; returns
    ``[s, b, heads * d]``. The scale is ``1/sqrt(d)`` unless ``softmax_scale`` is given.
    """

    def __init__(self, config: Any, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        if config.context_parallel_size > 1:
            raise NotImplementedError("context parallelism is not built into SdpaAttention")
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Attend causally."""
        tokens, batch, heads, width = query.shape
        repeat = heads // key.shape[2]
        query, key, value = (each.permute(1, 2, 0, 3) for each in (query, key, value))
        if repeat > 1:
            key, value = (each.repeat_interleave(repeat, dim=1) for each in (key, value))
        out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.softmax_scale)
        return out.permute(2, 0, 1, 3).reshape(tokens, batch, heads * width)
